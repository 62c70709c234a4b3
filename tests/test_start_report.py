"""What the log says before the first step."""

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath

from configs import reviews
from reporting.start_report import report_saving, start_report
from training import keys
from training.state import TrainState


def test_start_report_shows_devices_shards_parameters_padding_and_where_training_starts(
    layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cell = {'kernel': jnp.ones((40, 30)), 'bias': jnp.ones(30)}
    params = {'cell': cell, 'embedding': jnp.ones((7, 2))}
    state = TrainState(jnp.int32(0), params, (), keys.root_keys(3, 'threefry2x32'))
    config, workdir = reviews.get_config(), epath.Path('runs/x')
    caplog.set_level(logging.INFO)

    def report(step: int, resumed: bool) -> list[str]:
        caplog.clear()
        made = dataclasses.replace(state, step=jnp.int32(step))
        start_report(config, layout(2), made, workdir, resumed, 'texts', (), 0.217)
        return [' '.join(line.split()) for line in caplog.messages]

    new = report(0, resumed=False)
    for step in (0, 312):
        resumed = report(step, resumed=True)
        assert [*new[:7], *new[8:]] == [*resumed[:7], *resumed[8:]]
        assert resumed[7] == f'start resumed after step {step} from runs/x/checkpoints/{step}'
    assert new == [
        'data texts',
        'batches 64 examples, padded to 12, 20, 28, 42 ids (about 22% padding); '
        'evaluation: 256, to 42',
        'devices 2 x cpu in 1 process',
        'shards 8 (the most devices this run can ever use), 4 on each device; '
        'resumes exactly on 1, 2, 4 or 8 devices',
        'parameters 1,244 in 3 arrays',
        'cell 1,230 in 2 arrays',
        'embedding 14 in 1 array',
        'start new run',
        'root key 0000000000000003',
        'compiling the training step, once for each padded length ...',
    ]


def test_start_says_how_often_to_save_from_what_the_first_save_cost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    report_saving(0.02)  # sqrt(2 * 0.02 * 3600) and sqrt(2 * 0.02 * 86400)
    assert ' '.join(caplog.messages[0].split()) == (
        'saving holds training for 0.02 s; the best interval is 12 s with a failure an hour, '
        '59 s with one a day (--config.checkpoint_minutes=1.0)'
    )


@pytest.mark.parametrize(
    ('devices', 'shards', 'reduction', 'exact'),
    [
        (1, 1, 'tree', '1 device'),
        (2, 2, 'tree', '1 or 2 devices'),
        (1, 8, 'tree', '1, 2, 4 or 8 devices'),
        (2, 8, 'psum', '2 devices'),
        (1, 8, 'psum', '1 device'),
    ],
)
def test_start_report_says_which_devices_a_resume_may_use_and_how_to_allow_more(
    devices: int, shards: int, reduction: str, exact: str,
    layout: Any, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    state = TrainState(jnp.int32(0), {}, (), keys.root_keys(3, 'threefry2x32'))
    caplog.set_level(logging.INFO)
    for chosen in (0, shards):
        caplog.clear()
        config = dataclasses.replace(reviews.get_config(), num_shards=chosen)
        made = layout(devices, shards, reduction)
        start_report(config, made, state, epath.Path('runs/x'), False, 'texts', (), 0.2)
        (line,) = (line for line in caplog.messages if line.startswith('shards '))
        assert line.endswith(f'; resumes exactly on {exact}')
        advice = f'--config.num_shards=N in a new run allows more than {shards}'
        assert (advice in caplog.text) == (chosen == 0)
