"""What is learned: data, model, loss and metrics of a config, bound together for the trainer."""

from collections.abc import Callable
from typing import Any, NamedTuple

from configs.schema import BadInput, Config
from configs.sections import DataConfig, ModelConfig, PairsConfig, Seq2SeqConfig
from tasks import classification, seq2seq
from tasks.task import Predictor, Task


class Maker(NamedTuple):
    """How a task is made."""

    data_section: type
    task: Callable[[Config], Task]
    predictor: Callable[[Config, dict[str, Any]], Predictor]


TASKS = {
    ModelConfig: Maker(DataConfig, classification.make_task, classification.make_predictor),
    Seq2SeqConfig: Maker(PairsConfig, seq2seq.make_task, seq2seq.make_predictor),  # seq2seq
}


def make_task(config: Config) -> Task:
    """The task that the config's model section is for. Raises BadInput for unusable data."""
    maker = TASKS[type(config.model)]
    if type(config.data) is not maker.data_section:
        raise BadInput(
            f'config.data is {type(config.data).__name__}: expected {maker.data_section.__name__}, '
            f'which goes with {type(config.model).__name__}'
        )
    return maker.task(config)


def make_predictor(config: Config, facts: dict[str, Any]) -> Predictor:
    """What predicts with a trained task, from the config and the task's facts in a checkpoint."""
    return TASKS[type(config.model)].predictor(config, facts)
