"""Plots a metric of one or more runs over the steps, as .png, .pdf or .svg.

    python -m tools.plot RUN [RUN...] --metric=accuracy --out=accuracy.png

A metric is a name in metrics.csv, such as loss, accuracy or learning_rate, or gradient_norm.
"""

from collections.abc import Sequence

from errors import UserError
from input_pipeline.examples import not_among
from tools import curves
from tools.arguments import Arguments, existing_run, one_line_errors, run_tool


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Writes the file; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='workdir of a run')
    parser.add_argument('--metric', default='loss', help='what to plot (default: loss)')
    parser.add_argument(
        '--out', required=True, metavar='FILE', help='the file to write; its suffix is the format'
    )
    given = parser.parse_args(argv)
    kind = curves.format_of(given.out)
    runs = {name: curves.read(existing_run(name)) for name in given.runs}
    for name, found in runs.items():
        if not found:
            raise UserError(
                f'{name}: expected the workdir of a run, found neither metrics nor ledger'
            )
        if given.metric not in (known := curves.names({name: found})):
            raise UserError(f'{name}: --metric={not_among(given.metric, known)}')
    with curves.drawing(runs, given.metric) as figure:
        curves.write(given.out, curves.image(figure, kind))
    return 0


if __name__ == '__main__':
    run_tool(main)
