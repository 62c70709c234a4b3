"""Reads the curves of a run from its files, and draws them, for tools.report and tools.plot."""

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from errors import UserError
from runtime import ledger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = dict[str, np.ndarray]
"""float64[N, 2] of steps and values. 'step/NAME' is every step, from the ledger; 'train/NAME' the
means of log intervals and 'evaluation/NAME', from metrics.csv."""

FORMATS = ('png', 'pdf', 'svg')
PALETTE = ('#1f6f8b', '#e07a1f', '#5b8c3a', '#9b4f96', '#c0392b', '#7a6a4f', '#3d5a9e', '#888888')
STYLES: dict[str, dict[str, Any]] = {
    'step': {'linewidth': 0.5, 'alpha': 0.3},
    'train': {'linewidth': 1.2, 'alpha': 0.7, 'linestyle': '--'},
    'evaluation': {'linewidth': 1.6, 'marker': 'o', 'markersize': 3.5},
}
LEGEND_CHARACTERS = 90  # that fit side by side below the panel


def read(run: epath.Path) -> Curves:
    """Returns the curves that a run has. Raises UserError if a file is damaged."""
    points: dict[str, dict[int, float]] = {}
    file = run / 'metrics.csv'
    try:
        for step, name, value in csv.reader(io.StringIO(file.read_text() if file.exists() else '')):
            if step.isdecimal():  # no header
                points.setdefault(name, {})[int(step)] = float(value)
    except ValueError as error:
        raise UserError(
            f'{file}: damaged ({error}); remove it, the run does not need it'
        ) from error
    found = {name: np.array(sorted(by_step.items())) for name, by_step in points.items()}
    if ledger.segments(run / 'ledger'):
        rows = ledger.read(run / 'ledger')
        with np.errstate(invalid='ignore', divide='ignore'):  # a step may be not finite
            loss = rows['loss'].astype(np.float64) / rows['weight']
        found['step/loss'] = np.column_stack([rows['step'], loss])
        found['step/gradient_norm'] = np.column_stack([rows['step'], rows['grad_norm']])
    return found


def names(runs: Mapping[str, Curves], kind: str = '') -> list[str]:
    """Returns the metrics that any run has curves of: of one kind ('evaluation'), or of all."""
    split = [name.split('/', 1) for curves in runs.values() for name in curves]
    return list(dict.fromkeys(name for owner, name in split if kind in ('', owner)))


@contextlib.contextmanager
def drawing(
    runs: Mapping[str, Curves], metric: str, size: tuple[float, float] = (7, 4), legend: bool = True
) -> Iterator['Figure']:
    """Gives a figure of one metric of all runs. Raises UserError."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('curves need matplotlib: .venv/bin/pip install matplotlib') from error
    # A run may be called '$x$'. Text in an SVG stays text, and equal runs give equal files.
    style = {'text.parse_math': False, 'font.size': 9, 'svg.fonttype': 'none', 'svg.hashsalt': '0'}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(size, layout='constrained')
        draw_panel(figure.subplots(), runs, metric)
        if legend:
            draw_legend(figure, list(runs))
        yield figure


def format_of(out: str) -> str:
    """Returns the format that a file's name asks for. Raises UserError if it is none of FORMATS."""
    kind = Path(out).suffix.lower().removeprefix('.')
    if kind not in FORMATS:
        raise UserError(f'{out}: expected a name that ends in .png, .pdf or .svg')
    return kind


def image(figure: 'Figure', kind: str, **options: Any) -> bytes:
    """Returns a figure as a file of one of FORMATS, enlarged where a legend would be cut off."""
    file = io.BytesIO()
    metadata = {'png': {}, 'pdf': {'CreationDate': None}, 'svg': {'Date': None}}[kind]
    figure.savefig(
        file, format=kind, dpi=150, bbox_inches='tight', pad_inches=0.1, metadata=metadata,
        **options,
    )  # fmt: skip
    return file.getvalue()


def draw_panel(panel: 'Axes', runs: Mapping[str, Curves], metric: str) -> None:
    """Draws one metric of all runs."""
    for color, curves in zip(cycle(len(runs)), runs.values(), strict=True):
        for kind, style in STYLES.items():
            if (curve := curves.get(f'{kind}/{metric}')) is not None:
                panel.plot(*curve.T, color=color, **style)
    panel.set_title(metric.replace('_', ' '), loc='left', fontweight='bold')
    panel.set_xlabel('step')
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[['top', 'right']].set_visible(False)


def cycle(count: int) -> list[str]:
    """Returns a color for each run."""
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def draw_legend(figure: 'Figure', runs: Sequence[str]) -> None:
    """Explains the kinds of lines above the panel, and the colors of several runs below."""
    from matplotlib.lines import Line2D

    kinds = ('each step', 'mean of log interval', 'evaluation')
    lines = [Line2D([], [], color='#444444', **style) for style in STYLES.values()]
    figure.legend(lines, kinds, loc='outside upper right', ncols=3, frameon=False)
    if len(runs) > 1:
        swatches = [Line2D([], [], color=color, linewidth=4) for color in cycle(len(runs))]
        columns = max(1, LEGEND_CHARACTERS // (max(map(len, runs)) + 8))
        figure.legend(swatches, runs, loc='outside lower center', ncols=columns, frameon=False)


def write(out: str, data: bytes) -> None:
    """Writes a file completely or not at all, and reports it. Raises UserError if it cannot."""
    special = Path(out).exists() and not Path(out).is_file()  # such as /dev/stdout: not to replace
    partial = Path(out if special else f'{out}.partial')
    try:
        partial.write_bytes(data)
        partial.replace(out)
    except OSError as error:
        if not special:
            partial.unlink(missing_ok=True)
        raise UserError(f'{out}: cannot be written ({error.strerror})') from error
    print(f'wrote {out}')
