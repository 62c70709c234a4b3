"""Reports whether two runs are the same run and, if not, the first step and value that differ.

    python -m tools.compare_runs RUN_A RUN_B [--plot FILE.png]

Lists what differs around the runs first: config, environment, code and data. Reads the ledgers,
checkpoints and summaries of two workdirs; needs no accelerator and no JAX.
Exit code 0: the same run, bit for bit. 1: not the same. 2: there is nothing to compare.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from errors import UserError
from runtime import ledger
from runtime.run_record import read_record
from tools import curves
from tools.arguments import Arguments, existing_run, one_line_errors, run_tool

# Within a step, each can change only those that follow. Sums other than the loss (right answers,
# tokens) count as part of it.
CAUSES = {
    'batch': 'the data (batch fingerprint)',
    'keys': 'the dropout keys (their fingerprint)',
    'loss': 'the loss',
    'grad_norm': 'the gradient (its norm)',
    'parameters': 'the parameters after the update (their fingerprint)',
}
# In the manifest, but they describe the state and not what the run depends on.
OF_A_STATE = ('structure', 'state_fingerprint', 'evaluation')
SHOWN_FILES = 8  # of changed code


class Run(NamedTuple):
    """What the files of a workdir say of its run."""

    name: str
    rows: np.ndarray  # the ledger, from step 1
    run_record: dict[str, Any]  # of the newest checkpoint; empty if there is none
    final: dict[str, Any]  # root key; fingerprint and metrics of the state after the last row


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Prints the comparison; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('run_a', help='workdir of a run')
    parser.add_argument('run_b', help='workdir of another')
    parser.add_argument('--plot', metavar='FILE', help='plot both losses and their difference')
    given = parser.parse_args(argv)
    a, b = load(given.run_a), load(given.run_b)
    refuse_other_model(a, b)
    same, verdict = compare(a, b)
    for line in (*circumstances(a, b), *verdict):
        print(line)
    if given.plot:
        plot(a, b, given.plot)
    return 0 if same else 1


def load(workdir: str) -> Run:
    """Reads a run. Raises UserError if there is none, or its ledger is incomplete."""
    path = existing_run(workdir)
    rows = ledger.read(path / 'ledger')
    last = int(rows['step'][-1])
    files = {int(p.parts[-3]): p for p in path.glob('checkpoints/*/run/metadata')
             if p.parts[-3].isdecimal()}  # fmt: skip
    newest = max(files, default=0)
    if newest > last:
        raise UserError(f'{path}/ledger: ends at step {last}, a checkpoint is of step {newest}')
    summary_file, final = path / 'summary.json', dict[str, Any]()
    try:
        run_record = read_record(files[newest].parents[1]) if files else {}
        summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
        if not isinstance(summary, dict):
            raise ValueError('summary.json holds no object')
    except ValueError as error:
        raise UserError(f'{workdir}: a checkpoint or summary.json is damaged ({error})') from error
    for step, facts in ((newest, run_record.get('manifest', {})), (summary.get('step'), summary)):
        of_last = ('root_key', 'state_fingerprint', 'eval')[: 3 if step == last else 1]
        final |= {name: facts[name] for name in of_last if name in facts}
    return Run(workdir, rows, run_record, final)


def refuse_other_model(a: Run, b: Run) -> None:
    """Raises UserError if the runs train different models, or add up different sums.

    Root keys are compared later; versions of this code have stored them differently.
    """
    arrays = [run.run_record.get('manifest', {}).get('structure', {}) for run in (a, b)]
    columns = [dict.fromkeys(run.rows.dtype.names or (), 'a ledger column') for run in (a, b)]
    for one, other in (arrays if all(arrays) else columns, columns):
        for name in [*one, *other]:
            if one.get(name) != other.get(name) and not name.startswith('.root_key'):
                raise UserError(
                    f'{a.name} and {b.name} train different models: {name} is '
                    f'{one.get(name, "missing")} in one, {other.get(name, "missing")} in the other'
                )


def circumstances(a: Run, b: Run) -> Iterator[str]:
    """Yields a line for each run and for each difference in config, environment, code and data."""
    yield f'A: {a.name}, {len(a.rows)} steps'
    yield f'B: {b.name}, {len(b.rows)} steps'
    if not (a.run_record and b.run_record):
        yield 'One of them has no checkpoint, so config and environment cannot be compared.'
        return
    for title, section in (('config', 'config'), ('environment', 'manifest'), ('data', 'task')):
        if title == 'data':
            yield from code_changes(*(run.run_record['manifest'].get('code') for run in (a, b)))
        one, other = (flat(run.run_record.get(section, {})) for run in (a, b))
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                yield f'  {title}: {name}: {change(one.get(name), other.get(name))}'


def code_changes(one: dict[str, Any] | None, other: dict[str, Any] | None) -> Iterator[str]:
    """Yields a line if the files that a run consists of differ, or are recorded in one run only."""
    if one is None or other is None:
        if one or other:
            yield f'  code: not recorded in {"B" if one else "A"}'
        return
    names = one['files'].keys() | other['files'].keys()
    differ = sorted(name for name in names if one['files'].get(name) != other['files'].get(name))
    if differ:
        more = [f'{len(differ) - SHOWN_FILES} more'] if len(differ) > SHOWN_FILES else []
        commits = ' -> '.join(commit(code) for code in (one, other))
        yield f'  code: {", ".join(differ[:SHOWN_FILES] + more)} (commit {commits})'


def commit(code: dict[str, Any]) -> str:
    """Returns a short commit, marked if the work tree had other changes."""
    return (code['commit'][:12] or 'unknown') + (' with changes' if code['dirty'] else '')


def flat(facts: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns nested facts under dotted names, without code and what describes the state."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if name not in (*OF_A_STATE, 'code'):
            dotted = prefix + name
            found |= flat(value, f'{dotted}.') if isinstance(value, dict) else {dotted: value}
    return found


def change(one: Any, other: Any) -> str:
    """Returns 'one -> other'; for long lists, such as a vocabulary, the first difference."""
    if isinstance(one, list) and isinstance(other, list) and len(one) + len(other) > 12:
        place = next(i for i in range(len(one) + 1) if one[i : i + 1] != other[i : i + 1])
        one, other, sizes = one[place : place + 1], other[place : place + 1], (len(one), len(other))
        differs = f'{sizes[0]} and {sizes[1]} entries, the first difference at {place}: '
        return differs + change(one, other)
    texts = [json.dumps(value) for value in (one, other)]
    return ' -> '.join(f'{t[:60]}... ({len(t)} letters)' if len(t) > 200 else t for t in texts)


def compare(a: Run, b: Run) -> tuple[bool, list[str]]:
    """Returns whether they are the same run, and the verdict in words."""
    steps = min(len(a.rows), len(b.rows))
    if parted := first_difference(a.rows[:steps], b.rows[:steps]):
        row, (first, *others) = parted
        return False, [
            f'The runs diverge at step {row + 1}'
            + (f'; the {row} steps before are the same, bit for bit.' if row else '.'),
            f'First to differ: {CAUSES[cause_of(first)]}: '
            f'{shown(a.rows[row], first)} -> {shown(b.rows[row], first)}.',
            *(
                [f'Also different in that step, as a consequence: {", ".join(others)}.']
                if others
                else []
            ),
        ]
    if a.final.get('root_key') != b.final.get('root_key') and a.final and b.final:
        return False, [
            f'Different root keys: {a.final.get("root_key")} -> {b.final.get("root_key")}.'
        ]
    if len(a.rows) != len(b.rows):
        sizes = f'A has {len(a.rows)} steps, B {len(b.rows)}'
        return False, [f'The same bits as far as both go: {sizes}.']
    for name in ('state_fingerprint', 'eval'):
        one, other = a.final.get(name), b.final.get(name)
        if one and other and one != other:
            return False, [f'All {steps} steps are the same, but {name}: {change(one, other)}.']
    final = a.final.get('state_fingerprint') or b.final.get('state_fingerprint', 'unknown')
    return True, [f'The same run, bit for bit: {steps} steps, final state {final}.']


def cause_of(column: str) -> str:
    """Returns the entry of CAUSES that a ledger column belongs to."""
    return column if column in CAUSES else 'loss'


def first_difference(a: np.ndarray, b: np.ndarray) -> tuple[int, list[str]] | None:
    """Returns the first row that differs and its columns that do, in the order of CAUSES."""
    order = list(CAUSES)
    columns = [name for name in a.dtype.names or () if name != 'step']
    columns.sort(key=lambda name: (order.index(cause_of(name)), name not in CAUSES))
    words = [np.stack([rows[name].view('<u4') for name in columns]) for rows in (a, b)]
    differs = words[0] != words[1]
    if not differs.any():
        return None
    row = int(differs.any(axis=0).argmax())
    return row, [name for name, column in zip(columns, differs, strict=True) if column[row]]


def shown(row: np.void, column: str) -> str:
    """Formats a value of a row, floats with their bits. The loss is the mean of the step."""
    word = f'0x{row[column].view("<u4"):08x}'
    if row.dtype[column].kind != 'f':
        return word
    if column == 'loss':
        return f'{float(row["loss"]) / float(row["weight"]):.9g} (its sum {word})'
    return f'{"" if column in CAUSES else column + " "}{row[column]:.9g} ({word})'


def plot(a: Run, b: Run, file: str) -> None:
    """Plots both losses, and their difference below, into a file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('--plot needs matplotlib: .venv/bin/pip install matplotlib') from error
    figure = Figure((9, 6), layout='constrained')
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    losses = [run.rows['loss'].astype(np.float64) / run.rows['weight'] for run in (a, b)]
    steps = min(map(len, losses))
    apart = np.abs(losses[1][:steps] - losses[0][:steps])
    upper.plot(a.rows['step'], losses[0], 'tab:orange', linewidth=3, label=f'A: {a.name}')
    upper.plot(b.rows['step'], losses[1], 'black', linewidth=0.8, label=f'B: {b.name}')
    seen = np.where(apart > 0, apart, np.nan) if (apart > 0).any() else apart
    lower.plot(a.rows['step'][:steps], seen, 'k.', markersize=3)
    lower.set_yscale('log' if (apart > 0).any() else 'linear')  # from a last bit to the whole loss
    title = f'{steps} steps, the same bits'
    if parted := first_difference(a.rows[:steps], b.rows[:steps]):
        title = f'the runs diverge at step {parted[0] + 1}: {parted[1][0]}'
        for panel in (upper, lower):
            panel.axvline(parted[0] + 1, color='tab:red', linewidth=1, linestyle='--')
    upper.set(title=title, ylabel='mean loss of the step')
    lower.set(xlabel='step', ylabel='|loss of A - loss of B|')
    upper.legend()
    curves.write(file, curves.image(figure, curves.format_of(file)))


if __name__ == '__main__':
    run_tool(main)
