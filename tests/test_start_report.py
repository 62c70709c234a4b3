"""What the log tells before the first step."""

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath

from configs import reviews
from reporting.start_report import start_report
from training import keys
from training.state import TrainState


def test_start_report_tells_devices_parameters_padding_and_where_the_run_goes_on(
    layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cell = {'kernel': jnp.ones((40, 30)), 'bias': jnp.ones(30)}
    params = {'cell': cell, 'embedding': jnp.ones((7, 2))}
    state = TrainState(jnp.int32(0), params, (), keys.root_keys(3, 'threefry2x32'))
    caplog.set_level(logging.INFO)
    for made in (state, dataclasses.replace(state, step=jnp.int32(312))):
        start_report(reviews.get_config(), layout(2), 'texts', 0.217, made, epath.Path('runs/x'))
    told = [' '.join(line.split()) for line in caplog.messages]
    new, resumed = told[: len(told) // 2], told[len(told) // 2 :]
    assert new[:-1] == resumed[:-1]
    assert new == [
        'data: texts',
        'batches: 64 examples, padded to 12, 20, 28, 42 ids (about 22% is padding); '
        'in evaluation 256, to 42',
        '2 cpu devices in 1 process(es), mesh data=2, 4 of 8 shards on each; a resume gives the '
        'same bits on a device count of 1, 2, 4, 8',
        'parameters 3 arrays 1,244',
        'cell 2 arrays 1,230',
        'embedding 1 arrays 14',
        'new run, root key 0000000000000003',
    ]
    assert resumed[-1] == 'resumed after step 312 from runs/x/checkpoints/312, ' + new[-1][9:]
