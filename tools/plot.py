"""Draws a metric of one run or several, over the steps, into a PNG file.

    python -m tools.plot RUN [RUN...] --metric=loss --out=curve.png

A metric is one that TensorBoard shows: loss, accuracy, gradient_norm, learning_rate, ...
"""

import io
import sys
from collections.abc import Sequence

from errors import KeyfoldError, UserError
from input_pipeline.examples import not_among
from runtime.command_line import existing_run, refuse
from tools import curves
from tools.arguments import Arguments


def main(argv: Sequence[str]) -> int:
    """Writes the file; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='workdir of a run')
    parser.add_argument(
        '--metric',
        default='loss',
        help='loss, accuracy, gradient_norm, learning_rate, ... as in TensorBoard (default: loss)',
    )
    parser.add_argument('--out', required=True, metavar='FILE.png', help='the file to write')
    given = parser.parse_args(argv)
    try:
        runs = {name: curves.read(existing_run(name)) for name in given.runs}
        if missing := next((n for n in runs if given.metric not in curves.names({n: runs[n]})), ''):
            known = curves.names({missing: runs[missing]})
            raise UserError(f'{missing}: --metric={not_among(given.metric, known)}')
        png = io.BytesIO()
        curves.draw(runs, [given.metric]).savefig(png, dpi=150, format='png')
        curves.write(given.out, png.getvalue())
    except KeyfoldError as error:
        refuse(error)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
