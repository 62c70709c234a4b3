"""placeholder"""

from configs.schema import Config


def get_config() -> Config:
    return Config(num_steps=1000, num_shards=8)
