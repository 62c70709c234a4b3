"""The curves of a run, from its files, and how they are drawn: what report and plot share."""

import collections
import contextlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError

from errors import UserError
from reporting.tensorboard import Event
from runtime import ledger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = dict[str, np.ndarray]
"""float64[N, 2], steps and values. 'step/NAME': every step, from the ledger; 'train/NAME': means of
log intervals and 'evaluation/NAME', from TensorBoard's files."""

PALETTE = ('#1f6f8b', '#e07a1f', '#5b8c3a', '#9b4f96', '#c0392b', '#7a6a4f', '#3d5a9e', '#888888')


def read(run: epath.Path) -> Curves:
    """The curves that a run has. Raises UserError where a file is damaged."""
    points: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for file in sorted((run / 'tensorboard').glob('events*')):
        for record in records(file.read_bytes()):
            try:
                event = Event.FromString(record)
            except DecodeError as error:
                raise UserError(f'{file}: damaged ({error}); the run does not need it') from error
            for value in event.summary.value:
                if value.HasField('simple_value'):  # a resumed run repeats what it had lost
                    points[value.tag][event.step] = value.simple_value
    found = {name: np.array(sorted(by_step.items())) for name, by_step in points.items()}
    if ledger.segments(run / 'ledger'):
        rows = ledger.read(run / 'ledger')
        with np.errstate(invalid='ignore', divide='ignore'):  # a step may be not finite
            loss = rows['loss'].astype(np.float64) / rows['weight']
        found['step/loss'] = np.column_stack([rows['step'], loss])
        found['step/gradient_norm'] = np.column_stack([rows['step'], rows['grad_norm']])
    return found


def records(data: bytes) -> Iterator[bytes]:
    """Of a TFRecord file: length uint64, checksum, record, checksum. A last one cut off is none."""
    place = 0
    while place + 12 <= len(data):
        (size,) = struct.unpack_from('<Q', data, place)
        if place + 16 + size > len(data):
            return
        yield data[place + 12 : place + 12 + size]
        place += 16 + size


def names(runs: Mapping[str, Curves], kind: str = '') -> list[str]:
    """What there are curves of, in any run: of one kind ('evaluation') or of all."""
    split = [name.split('/', 1) for curves in runs.values() for name in curves]
    return list(dict.fromkeys(name for owner, name in split if kind in ('', owner)))


def draw(runs: Mapping[str, Curves], metrics: Sequence[str]) -> 'Figure':
    """A panel for each metric, with the curves of all runs in it. Raises UserError."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('curves need matplotlib: pip install matplotlib') from error
    columns = 3 if len(metrics) % 3 == 0 else min(2, len(metrics))
    rows = -(-len(metrics) // columns)
    # Names of runs are no formulas.
    with matplotlib.rc_context({'text.parse_math': False, 'font.size': 9}):
        size = (3.6 * columns, 3 * rows) if columns > 1 else (7, 4)
        figure = Figure(size, layout='constrained')
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for panel, metric in zip(panels, metrics, strict=False):
            draw_panel(panel, runs, metric)
        for panel in list(panels)[len(metrics) :]:
            panel.axis('off')
        legend(figure, list(runs))
    return figure


def draw_panel(panel: 'Axes', runs: Mapping[str, Curves], metric: str) -> None:
    """One metric of all runs."""
    for color, curves in zip(cycle(len(runs)), runs.values(), strict=True):
        for kind, style in STYLES.items():
            if (curve := curves.get(f'{kind}/{metric}')) is not None:
                panel.plot(*curve.T, color=color, **style)
    panel.set_title(metric.replace('_', ' '), loc='left', fontweight='bold')
    panel.set_xlabel('step')
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[['top', 'right']].set_visible(False)


STYLES: dict[str, dict[str, Any]] = {
    'step': {'linewidth': 0.5, 'alpha': 0.3},
    'train': {'linewidth': 1.2, 'alpha': 0.7, 'linestyle': '--'},
    'evaluation': {'linewidth': 1.6, 'marker': 'o', 'markersize': 3.5},
}


def cycle(count: int) -> list[str]:
    """A color for each run."""
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def legend(figure: 'Figure', runs: Sequence[str]) -> None:
    """Above the panels what the lines are, below whose the colors."""
    from matplotlib.lines import Line2D

    told = ('each step', 'training', 'evaluation')
    lines = [Line2D([], [], color='#444444', **style) for style in STYLES.values()]
    figure.legend(lines, told, loc='outside upper right', ncols=3, frameon=False)
    if len(runs) > 1:
        swatches = [Line2D([], [], color=color, linewidth=4) for color in cycle(len(runs))]
        figure.legend(swatches, runs, loc='outside lower center', ncols=3, frameon=False)


def write(out: str, data: bytes) -> None:
    """Writes a file, whole or not at all. Raises UserError where it can not be written."""
    partial = Path(f'{out}.partial')
    try:
        partial.write_bytes(data)
        partial.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f'--out={out}: can not be written ({error.strerror})') from error
