"""The files of a run that people and scripts read: summary.json and texts."""

import json
import logging
from typing import Any

import jax
from etils import epath

from arrays import Metrics
from configs.schema import Config, to_dict
from errors import SaveFailed, first_line
from reporting.log import scalars_text
from runtime.run_record import RunRecord
from runtime.storage import write_whole
from training.state import TrainState, root_key_hex, state_fingerprint

Summary = dict[str, Any]  # the contents of summary.json


def write_inputs(workdir: epath.Path, config: Config, files: dict[str, str]) -> None:
    """Writes config.json and the task's `files`, as `write_files` does."""
    write_files(workdir, files | {'config.json': json.dumps(to_dict(config), indent=2)})


def write_files(workdir: epath.Path, files: dict[str, str]) -> None:
    """Writes text files into the workdir, each completely or not at all. Raises SaveFailed."""
    try:
        for name, text in files.items() if jax.process_index() == 0 else ():
            write_whole(workdir / name, (text.rstrip() + '\n').encode())
    except Exception as error:  # OSError, or whatever the client of a bucket raises
        raise SaveFailed(
            f'{workdir}: {", ".join(files)} not written ({first_line(error)})'
        ) from error


def write_summary(
    workdir: epath.Path, state: TrainState, record: RunRecord, metrics: Metrics, rate: float
) -> Summary:
    """Writes the summary of a finished run to summary.json, logs it, and returns it.

    `metrics` are of the last evaluation; `rate` is in examples/s.
    """
    summary = {
        'step': int(state.step),
        'eval': metrics,
        'evaluation_data': record['task']['evaluation_data'],
        'state_fingerprint': state_fingerprint(state),
        'root_key': root_key_hex(state),
        'num_shards': record['manifest']['num_shards'],
        'device_count': jax.device_count(),
        'process_count': jax.process_count(),
        'examples_per_second': rate,
    }
    write_files(workdir, {'summary.json': json.dumps(summary, indent=2)})
    log_finished(workdir, summary)
    return summary


def read_summary(workdir: epath.Path, step: int) -> Summary:
    """Returns the workdir's summary.json, or {} without one of this step."""
    try:
        summary = json.loads((workdir / 'summary.json').read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return summary if isinstance(summary, dict) and summary.get('step') == step else {}


def finished_summary(workdir: epath.Path, step: int, record: RunRecord) -> Summary:
    """Logs and returns the workdir's summary.json, or {} without one of this step and data."""
    summary = read_summary(workdir, step)
    if summary.get('evaluation_data') != record['task']['evaluation_data']:
        return {}
    log_finished(workdir, summary)
    return summary


def log_finished(workdir: epath.Path, summary: Summary) -> None:
    """Logs the metrics of a finished run, rounded; summary.json has them in full."""
    metrics, fingerprint = scalars_text(summary['eval']), summary['state_fingerprint'][:16]
    shown = f'{metrics}  state_fingerprint {fingerprint}  ({workdir / "summary.json"})'
    logging.info('the run is finished at step %d: %s', summary['step'], shown)
