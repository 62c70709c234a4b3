"""Run records outlive the code: an option added later orphans no run, one taken away is named."""

import dataclasses
import json
from typing import Any

import pytest

import tasks
from configs import reviews, schema
from configs.schema import Config, options, to_dict, trajectory_changes
from errors import UserError
from tasks import classification
from tasks.task import Task


def record(config: Config) -> dict[str, Any]:
    """Returns what a checkpoint holds of a config, as it comes back from JSON."""
    manifest = {'task': schema.task_name(config)}
    return json.loads(json.dumps({'config': to_dict(config), 'manifest': manifest}))  # type: ignore


WORDS = {'data.tokenizer': 'words'}  # until there was an option
OPTIONS = [
    (name, WORDS.get(name, field.default)) for name, _, field in options(reviews.get_config())
]


@pytest.mark.parametrize(('name', 'default'), OPTIONS, ids=[name for name, _ in OPTIONS])
def test_record_from_before_an_option_loads_with_its_default(name: str, default: Any) -> None:
    saved = record(reviews.get_config())
    del saved['config'][name]
    config = tasks.config_from_record(saved)
    values = to_dict(config)
    if name == 'data.tokenizer':
        default = 'words'  # which texts were split into before there was a choice
    assert values.pop(name) == (list(default) if isinstance(default, tuple) else default)
    assert values == saved['config']
    assert trajectory_changes(config, saved['config']) == []


def test_record_with_an_option_that_the_code_lacks_is_refused_by_name() -> None:
    saved = record(reviews.get_config())
    saved['config']['model.heads'] = 8
    with pytest.raises(UserError, match=r'^config\.model\.heads is in the run record, but this'):
        tasks.config_from_record(saved)


def test_option_added_since_counts_as_changed_only_if_it_is_not_its_default() -> None:
    config = reviews.get_config()
    saved = record(config)['config']
    del saved['data.affixes']
    assert trajectory_changes(config, saved) == []
    data = dataclasses.replace(config.data, affixes=(4, 3))
    changed = trajectory_changes(dataclasses.replace(config, data=data), saved)
    assert changed == ['data.affixes: () -> (4, 3)']


def test_only_options_that_decide_no_bit_may_differ_on_a_resume() -> None:
    """One more in this list is one more way to continue a run as another one, without a word."""
    named = options(reviews.get_config())
    found = {name for name, _, field in named if field.metadata['resumable']}
    streams = {f'seeds.{name}' for name in ('params', 'dropout', 'sample', 'data')}
    reading = {'data_dir', 'columns', 'delimiter', 'bad_rows', 'loader_threads'}
    often = {'eval_every', 'checkpoint_every', 'checkpoint_minutes', 'log_every'}
    kept = {'keep_newest', 'keep_best', 'best_metric', 'patience'}
    others = {'seed', 'cpu_threads', 'optimizer.on_nonfinite'}
    assert found == others | streams | often | kept | {f'data.{name}' for name in reading}


def test_run_may_be_prolonged_only_if_its_schedule_does_not_end_with_it() -> None:
    config = reviews.get_config()
    for fields, allowed in (
        ({'schedule': 'cosine', 'decay_steps': 0}, False),
        ({'schedule': 'cosine', 'decay_steps': 500}, True),
        ({'schedule': 'constant', 'decay_steps': 0}, True),
    ):
        optimizer = dataclasses.replace(config.optimizer, **fields)
        short, long = (
            dataclasses.replace(config, optimizer=optimizer, num_steps=steps)
            for steps in (1000, 1001)
        )
        changed = trajectory_changes(long, to_dict(short))
        assert changed == ([] if allowed else ['num_steps: 1000 -> 1001'])


@pytest.mark.parametrize('name', ['summarization', '../train', 'os', ''])
def test_record_of_a_task_that_the_code_lacks_is_refused_by_name(name: str) -> None:
    saved = record(reviews.get_config())
    saved['manifest']['task'] = name
    with pytest.raises(UserError, match='this code has no task'):
        tasks.config_from_record(saved)


def test_sections_of_two_tasks_do_not_make_a_config() -> None:
    @dataclasses.dataclass
    class ForeignModel(type(reviews.get_config().model)):  # type: ignore[misc]
        """A section that another module declares."""

    mixed = dataclasses.replace(reviews.get_config(), model=ForeignModel())
    with pytest.raises(UserError, match='expected two sections of one task'):
        schema.task_name(mixed)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Returns the configs that a task is made of; it declares one sum and returns two."""
    configs: list[Config] = []
    fields: Any = dict.fromkeys(field.name for field in dataclasses.fields(Task))
    declared = {'sum_names': ('loss',), 'loss_sums': lambda *_: {'loss': 1, 'weight': 2}}
    task = Task(**(fields | declared | {'warnings': ()}))
    monkeypatch.setattr(
        classification, 'make_task', lambda config, _: [configs.append(config), task][1]
    )
    return configs


def origin(**options: Any) -> dict[str, Any]:
    """Returns the record of a classifier to start from."""
    return {'manifest': {'task': 'classification'}, 'config': options, 'task': {}}


def test_options_that_the_run_to_start_from_decides_are_said_to_have_no_effect(
    made: list[Config],
) -> None:
    saved = origin(**{'data.tokenizer': 'bpe', 'data.affixes': []})
    for tokenizer, affixes, ignored in (('', (), 0), ('bpe', (), 0), ('words', (3, 2), 2)):
        config = reviews.get_config()
        config.data = dataclasses.replace(config.data, tokenizer=tokenizer, affixes=affixes)
        warnings = tasks.make_task(config, saved).warnings
        assert len(warnings) == ignored
        assert (made[-1].data.tokenizer, made[-1].data.affixes) == ('bpe', ())
    expected = "config.data.tokenizer = 'words' has no effect: config.init.run has 'bpe'"
    assert warnings[0] == expected


def test_run_from_before_the_tokenizer_lends_its_unit(made: list[Config]) -> None:
    tasks.make_task(reviews.get_config(), origin(**{'data.unit': 'character'}))
    assert made[0].data.tokenizer == 'characters'


def test_sums_by_other_names_than_the_task_declares_are_refused(made: list[Config]) -> None:
    """The columns of the ledger would exchange their names."""
    task = tasks.make_task(reviews.get_config())
    with pytest.raises(TypeError, match=r"loss_sums gives \['loss', 'weight'\], not \('loss',\)"):
        task.loss_sums({}, {}, {}, 0)
