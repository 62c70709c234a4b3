"""Draws the pictures of the documents: the keys, and a run that was killed and moved.

python -m docs.pictures                 # keys.png and moved.png; the second trains for minutes
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from tools import compare_runs, curves
from training import keys

DOCS = Path(__file__).parent
STEPS, SHARDS, CHOSEN = 3, 4, (1, 2)  # of the masks shown; (step, shard) of the highlighted path
PALE, DARK, DPI = '#d9d4c7', '#1f6f8b', 110
LAUNCHES = ((2, 80), (8, 190), (1, 0))  # devices, and the step at which it is killed (0: never)


def main() -> None:
    """Draws both pictures."""
    draw_keys(DOCS / 'keys.png')
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, moved = Path(folder, 'undisturbed'), Path(folder, 'moved')
        launched(undisturbed, 2)
        starts = [launched(moved, devices, until) for devices, until in LAUNCHES]
        draw_moved(DOCS / 'moved.png', undisturbed, moved, starts)


@matplotlib.rc_context({'font.size': 8})
def draw_keys(file: Path) -> None:
    """Draws the tree of folds, and the masks at its leaves."""
    figure = Figure((8.6, 3.4), layout='constrained')
    tree, *masks = figure.subplots(1, 3, width_ratios=(1.7, 1, 1))
    draw_tree(tree)
    for panel, stream in zip(masks, ('dropout', 'sample'), strict=True):
        draw_masks(panel, stream)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Saves a PNG of few colors, which keeps the repository small."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    Image.open(drawn).convert('RGB').quantize(48, dither=Image.Dither.NONE).save(
        file, optimize=True
    )


def draw_tree(panel: Axes) -> None:
    """Draws root -> streams -> steps -> shards, with one path highlighted."""
    step, shard = CHOSEN
    levels = [
        ['root'],
        [f'{stream.name} {stream.value}' for stream in keys.Stream],
        [f'step {index}' for index in range(STEPS)],
        [f'shard {index}' for index in range(SHARDS)],
    ]
    parent = (0.0, 0.0)
    for x, (names, followed) in enumerate(zip(levels, (0, 1, step, shard), strict=True)):
        places = [(x * 1.0, (len(names) - 1) / 2 - index) for index in range(len(names))]
        for index, (place, name) in enumerate(zip(places, names, strict=True)):
            color = DARK if index == followed else '#777777'
            if x:
                ends = zip(parent, place, strict=True)
                panel.plot(*ends, color=color, linewidth=1, zorder=0)
            box = {'boxstyle': 'round', 'facecolor': 'white', 'edgecolor': color}
            panel.text(*place, name, ha='center', va='center', color=color, bbox=box, fontsize=7)
        parent = places[followed]
    panel.set(xlim=(-0.5, 3.5), ylim=(-2.2, 2.2), title='key = fold_in(parent, number)')
    panel.axis('off')


def draw_masks(panel: Axes, stream: str) -> None:
    """Draws the masks from the keys of a stream, by step and shard."""
    root, shape = keys.root_keys(0, 'threefry2x32'), (10, 10)
    gap = np.full((SHARDS * 12, STEPS * 12), np.nan)
    for step in range(STEPS):
        for shard in range(SHARDS):
            mask = jax.random.bernoulli(keys.shard_rngs(root, step, shard)[stream], 0.5, shape)
            gap[12 * shard : 12 * shard + 10, 12 * step : 12 * step + 10] = mask
    panel.imshow(gap, cmap=ListedColormap([PALE, '#4a4a4a']))
    panel.set_xticks([12 * step + 4.5 for step in range(STEPS)], map(str, range(STEPS)))
    panel.set_yticks([12 * shard + 4.5 for shard in range(SHARDS)], map(str, range(SHARDS)))
    panel.set(xlabel='step', ylabel='shard', title=f'masks of {stream}')
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    if stream == 'dropout':
        corner = (12 * CHOSEN[0] - 1.0, 12 * CHOSEN[1] - 1.0)
        panel.add_patch(Rectangle(corner, 11, 11, fill=False, edgecolor=DARK, linewidth=2))


def launched(workdir: Path, devices: int, until: int = 0) -> int:
    """Trains, and is killed once step `until` is logged. Returns the step it resumed after."""
    options = {'num_steps': 300, 'eval_every': 300, 'checkpoint_every': 50, 'log_every': 10}
    command = [sys.executable, 'train.py', '--config=configs/reviews.py', f'--workdir={workdir}']
    command += [f'--config.{name}={value}' for name, value in options.items()]
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}
    process = subprocess.Popen(
        command,
        cwd=DOCS.parent,
        env=env,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    start = 0
    for line in process.stdout:
        if resumed := re.search(r'resumed after step (\d+)', line):
            start = int(resumed[1])
        if until and re.search(rf'step +{until}/', line):
            process.kill()
    if process.wait() != (-9 if until else 0):
        raise SystemExit(f'{workdir}: ended with {process.returncode}')
    return start


@matplotlib.rc_context({'font.size': 8})
def draw_moved(file: Path, undisturbed: Path, moved: Path, starts: Sequence[int]) -> None:
    """Plots the loss of every step of both. Raises SystemExit unless they are the same run."""
    same, verdict = compare_runs.compare(*(compare_runs.load(str(r)) for r in (undisturbed, moved)))
    if not same:
        raise SystemExit('\n'.join(verdict))
    figure = Figure((8.6, 2.8), layout='constrained')
    panel = figure.subplots()
    steps, losses = curves.read(epath.Path(undisturbed))['step/loss'].T
    panel.plot(steps, losses, color=PALE, linewidth=6, label='uninterrupted, 2 devices')
    steps, losses = curves.read(epath.Path(moved))['step/loss'].T
    ends = [*starts[1:], int(steps[-1])]
    colors = curves.cycle(len(LAUNCHES))
    for (devices, killed), start, end, color in zip(LAUNCHES, starts, ends, colors, strict=True):
        part = slice(max(0, start - 1), end)
        how = f'from checkpoint {start}' if start else 'from the start'
        label = f'{devices} device{"s"[: devices > 1]} {how}'
        panel.plot(steps[part], losses[part], color=color, linewidth=1, label=label)
        if killed:
            panel.axvline(killed, color=color, linewidth=0.8, linestyle=':')
            bottom = panel.get_xaxis_transform()
            panel.text(killed + 2, 0.02, 'kill -9', color=color, transform=bottom)
    panel.set(xlabel='step', ylabel='loss', xlim=(0, steps[-1]))
    panel.set_title(f'{len(steps)} steps of two runs: the ledgers agree bit for bit', loc='left')
    panel.legend(loc='lower left', frameon=False)
    panel.spines[['top', 'right']].set_visible(False)
    save(figure, file)


if __name__ == '__main__':
    main()
