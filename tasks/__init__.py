"""What is learned: a file per task, with its options, data, model, loss, metrics and prediction.

A task is a module here with

    DataConfig, ModelConfig              its options, subclasses of those in configs/schema.py
    make_task(config, facts=None) -> Task    raises UserError for unusable data
    make_predictor(config, resume_facts) -> Predictor

No table lists the tasks. A config's task is the module that defines its sections; a run record
holds that module's name.
"""

import dataclasses
import importlib.util
from types import ModuleType
from typing import Any

from arrays import Sums
from configs import schema
from configs.schema import Config
from errors import UserError
from tasks.best_metric import with_best_metric
from tasks.task import Json, Predictor, Task

TOKENIZER = ('data.tokenizer', 'data.affixes')


def load(name: str) -> ModuleType:
    """Imports the task `name`. Raises UserError without one."""
    if not name.isidentifier() or importlib.util.find_spec(f'tasks.{name}') is None:
        raise UserError(f'this code has no task {name!r}: expected tasks/{name}.py')
    return importlib.import_module(f'tasks.{name}')


def make_task(config: Config, origin: Json | None = None) -> Task:
    """Makes the task of a config. Raises UserError for unusable data.

    `origin`: the run record of config.init.run, whose tokenizer and affixes the task takes.
    """
    name, ignored = schema.task_name(config), list[str]()
    if origin and (found := origin['manifest'].get('task', name)) != name:
        raise UserError(f'config.init.run = {config.init.run}: of task {found}, expected {name}')
    if origin:
        given = schema.to_dict(config)
        saved = schema.renamed(origin['config'], given)
        taken = {option: saved[option] for option in TOKENIZER if option in saved}
        ignored = [
            f'config.{option} = {given[option]!r} has no effect: config.init.run has {value!r}'
            for option, value in taken.items()
            if given[option] and given[option] != value
        ]
        schema.fill(config, taken)
    task: Task = load(name).make_task(config, origin['task'] if origin else None)

    def loss_sums(*args: Any) -> Sums:
        sums = task.loss_sums(*args)
        if sorted(sums) != sorted(task.sum_names):
            raise TypeError(f'{name}: loss_sums gives {sorted(sums)}, not {task.sum_names}')
        return sums

    checked = dataclasses.replace(task, loss_sums=loss_sums, warnings=(*ignored, *task.warnings))
    return with_best_metric(checked, config)


def config_from_record(record: Json) -> Config:
    """Rebuilds the config that a run record holds."""
    module = load(record['manifest'].get('task', 'classification'))
    return schema.fill(
        Config(data=module.DataConfig(), model=module.ModelConfig()), record['config']
    )


def predictor_from_record(record: Json) -> tuple[Config, Predictor]:
    """Returns the config and the predictor of a checkpoint's run record."""
    config = config_from_record(record)
    return config, load(schema.task_name(config)).make_predictor(config, record['task'])
