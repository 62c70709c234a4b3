"""Says whether two runs are the same run, and if not, where they part and at what.

    python -m tools.compare_runs RUN_A RUN_B [--plot FILE.png]

Reads the ledgers, checkpoints and summaries of two workdirs; needs no accelerator and no JAX.
Exit code 0: the same run, bit for bit. 1: not the same. 2: there is nothing to compare.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from configs.command_line import refuse
from configs.schema import BadInput
from training import ledger_files

# Within a step, what comes first can change what follows, and not the other way round.
CAUSES = {
    'batch': 'the data (batch fingerprint)',
    'keys': 'the dropout keys (their fingerprint)',
    'loss': 'the loss',
    'grad_norm': 'the gradient (its norm)',
    'parameters': 'the parameters after the update (their fingerprint)',
}

OF_THE_STATE = ('structure', 'state_fingerprint', 'root_key')  # not of the environment


class Run(NamedTuple):
    """What a workdir tells of its run."""

    name: str
    rows: np.ndarray  # the ledger
    header: dict[str, Any]  # of the newest checkpoint: config, task, manifest
    summary: dict[str, Any]  # empty while the run is not finished


def main(argv: Sequence[str]) -> int:
    """Prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog='compare_runs', description=__doc__.split('\n')[0])
    parser.add_argument('run_a', help='workdir of a run')
    parser.add_argument('run_b', help='workdir of another')
    parser.add_argument('--plot', metavar='FILE.png', help='draw both losses and their difference')
    given = parser.parse_args(argv)
    try:
        a, b = load(given.run_a), load(given.run_b)
        refuse_other_model(a, b)
        if given.plot:
            plot(a, b, given.plot)
    except BadInput as error:
        refuse(error)
    same, verdict = compare(a, b)
    for line in (*circumstances(a, b), *verdict):
        print(line)
    return 0 if same else 1


def load(workdir: str) -> Run:
    """Raises BadInput where there is no run, or its ledger is not whole."""
    path = epath.Path(workdir)
    if not path.is_dir():
        raise BadInput(f'{workdir}: expected the workdir of a run, found no folder')
    rows = ledger_files.read(path / 'ledger')
    if rows['step'][0] != 1:
        raise BadInput(f'{workdir}/ledger: begins at step {rows["step"][0]}, expected step 1')
    headers = sorted(path.glob('checkpoints/*/run/metadata'), key=step_of)
    summary = path / 'summary.json'
    try:
        header = json.loads(headers[-1].read_text()) if headers else {}
        return Run(
            workdir, rows, header, json.loads(summary.read_text()) if summary.exists() else {}
        )
    except ValueError as error:
        raise BadInput(f'{workdir}: a checkpoint or summary.json is damaged ({error})') from error


def step_of(header: epath.Path) -> int:
    """The step of the checkpoint that a header belongs to; -1 for one that is being written."""
    step = header.parent.parent.name
    return int(step) if step.isdigit() else -1


def refuse_other_model(a: Run, b: Run) -> None:
    """Raises BadInput when the runs train different models, or count different sums."""
    columns = [dict.fromkeys(run.rows.dtype.names or (), 'there') for run in (a, b)]
    arrays = [run.header.get('manifest', {}).get('structure', {}) for run in (a, b)]
    for one, other in (columns, arrays if all(arrays) else columns):
        for name in [*one, *other]:
            if one.get(name) != other.get(name):
                raise BadInput(
                    f'{a.name} and {b.name} train different models: {name} is '
                    f'{one.get(name, "missing")} and {other.get(name, "missing")}'
                )


def circumstances(a: Run, b: Run) -> Iterator[str]:
    """A line for every knob, fact of the task and fact of the environment that is not the same."""
    yield f'A: {a.name}, {len(a.rows)} steps    B: {b.name}, {len(b.rows)} steps'
    if not (a.header and b.header):
        yield 'no checkpoint in one of them: config and environment can not be compared'
        return
    for section in ('config', 'task', 'manifest'):
        one, other = a.header[section], b.header[section]
        for name in sorted(one.keys() | other.keys()):
            if name not in OF_THE_STATE and one.get(name) != other.get(name):
                yield f'  {section}: {name}: {brief(one.get(name))} and {brief(other.get(name))}'


def brief(value: Any) -> str:
    """A value, or how much there is of it."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f'{text[:80]}... ({len(text)} characters)'


def compare(a: Run, b: Run) -> tuple[bool, list[str]]:
    """(whether they are the same run, the verdict in words)."""
    steps = min(len(a.rows), len(b.rows))
    parted = first_difference(a.rows[:steps], b.rows[:steps])
    if parted is not None:
        row, column = parted
        return False, [
            f'The runs part at step {a.rows["step"][row]}. The first to differ is '
            f'{CAUSES[column]}: {shown(a.rows[row], column)} and {shown(b.rows[row], column)}.',
            f'The {row} steps before are the same, bit for bit.',
        ]
    if len(a.rows) != len(b.rows):
        return False, [f'The runs are the same, bit for bit, as far as both go: {steps} steps.']
    for name in ('root_key', 'state_fingerprint', 'eval'):
        if a.summary and b.summary and a.summary.get(name) != b.summary.get(name):
            both = f'{a.summary.get(name)} and {b.summary.get(name)}'
            return False, [
                f'All {steps} steps are the same, but the summaries differ: {name}: {both}.'
            ]
    final = a.summary.get('state_fingerprint', 'not written yet')
    return True, [f'The same run: {steps} steps, bit for bit. Final state: {final}']


def first_difference(a: np.ndarray, b: np.ndarray) -> tuple[int, str] | None:
    """(row, column) of the first difference: the first step, in it the first of CAUSES."""
    differs = {name: bits(a, name) != bits(b, name) for name in a.dtype.names or ()}
    sums = [column for name, column in differs.items() if name not in CAUSES and name != 'step']
    differs['loss'] = np.logical_or.reduce([differs['loss'], *sums])
    anywhere = np.logical_or.reduce([differs[name] for name in CAUSES])
    if not anywhere.any():
        return None
    row = int(anywhere.argmax())
    return row, next(name for name in CAUSES if differs[name][row])


def bits(rows: np.ndarray, column: str) -> np.ndarray:
    """A column's exact bits, uint32."""
    return np.ascontiguousarray(rows[column]).view('<u4')


def shown(row: np.void, column: str) -> str:
    """A value of a row as people read it, floats with their bits."""
    if column == 'loss':
        return f'{row["loss"] / row["weight"]:.9g} (sum 0x{row["loss"].view("<u4"):08x})'
    if column == 'grad_norm':
        return f'{row[column]:.9g} (0x{row[column].view("<u4"):08x})'
    return f'0x{row[column]:08x}'


def plot(a: Run, b: Run, file: str) -> None:
    """Draws both losses, and their difference below, into a PNG file."""
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 6), height_ratios=(3, 2)
    )
    losses = [run.rows['loss'].astype(np.float64) / run.rows['weight'] for run in (a, b)]
    for run, loss, style in zip((a, b), losses, ('-', '--'), strict=True):
        upper.plot(run.rows['step'], loss, style, linewidth=1, label=run.name)
    steps = min(map(len, losses))
    difference = losses[1][:steps] - losses[0][:steps]
    lower.plot(a.rows['step'][:steps], difference, linewidth=1, color='black')
    if difference.any():
        smallest = np.abs(difference[difference != 0]).min()
        lower.set_yscale('symlog', linthresh=float(smallest))
    parted = first_difference(a.rows[:steps], b.rows[:steps])
    if parted is not None:
        for panel in (upper, lower):
            panel.axvline(a.rows['step'][parted[0]], color='tab:red', linewidth=0.8)
    upper.set_ylabel('mean loss of the step')
    lower.set_ylabel('B - A' if difference.any() else 'B - A: zero at every step')
    lower.set_xlabel('step')
    upper.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
