"""What is learned: data, model, loss and metrics of a config, bound together for the trainer."""

from collections.abc import Callable

from configs.schema import BadInput, Config, DataConfig, ModelConfig, PairsConfig, Seq2SeqConfig
from tasks import classification, seq2seq
from tasks.task import Task

TASKS: dict[type, tuple[type, Callable[[Config], Task]]] = {
    ModelConfig: (DataConfig, classification.make_task),
    Seq2SeqConfig: (PairsConfig, seq2seq.make_task),
}


def make_task(config: Config) -> Task:
    """The task that the config's model section is for. Raises BadInput for unusable data."""
    data_section, make = TASKS[type(config.model)]
    if type(config.data) is not data_section:
        raise BadInput(
            f'config.data is {type(config.data).__name__}: expected {data_section.__name__}, '
            f'which goes with {type(config.model).__name__}'
        )
    return make(config)
