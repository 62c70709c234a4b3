"""What a trained run makes of new texts, from its newest checkpoint alone.

    python -m tools.predict RUN --text "..." [--text "..."]
    python -m tools.predict RUN --input FILE [--bad_lines=stop|skip] > FILE.jsonl

Prints a line of JSON for each text, in order: for a classifier the label, the probability of each
label and the attention that each word got; for sequence to sequence the decoded text. FILE has a
text on each line. A bad line is named, and stops it (exit code 2) or is skipped.
"""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import tasks
from errors import KeyfoldError, UserError
from reporting import log as logs
from runtime.checkpoints import Checkpoints, RunRecord
from runtime.command_line import existing_run, refuse
from runtime.storage import open_location
from tasks.task import Predictor
from tools.arguments import Arguments
from training.mesh import make_layout, make_mesh
from training.optimizer import make_optimizer, make_schedule
from training.state import abstract_state, make_create_state

ROWS = 256  # of a batch


def main(argv: Sequence[str]) -> int:
    """Prints the predictions; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('run', help='workdir of a run')
    parser.add_argument('--text', action='append', help='a text; may be given more than once')
    parser.add_argument('--input', metavar='FILE', help='file with a text on each line')
    parser.add_argument(
        '--bad_lines', choices=('stop', 'skip'), default='stop', help='(default: stop)'
    )
    given = parser.parse_args(argv)
    logs.quiet_libraries()
    try:
        if (given.text is None) == (given.input is None):
            raise UserError('expected --text or --input, one of them')
        texts = given.text or read_lines(given.input)
        predictor, params, _ = load(existing_run(given.run))
        for found in predictions(predictor, params, texts, skip=given.bad_lines == 'skip'):
            print(json.dumps(found, ensure_ascii=False))
    except KeyfoldError as error:
        refuse(error)
    return 0


def read_lines(file: str) -> list[str]:
    """The lines of a file; bytes that are not UTF-8 become lone surrogates, as in a command line.

    Raises UserError where it can not be read.
    """
    try:
        text = open_location(file).read_bytes().decode('utf-8-sig', 'surrogateescape')
    except OSError as error:
        raise UserError(f'--input={file}: can not be read ({error})') from error
    with io.StringIO(text, newline=None) as lines:  # splitlines() knows more ends of lines
        return [line.rstrip('\n') for line in lines]


def newest(run: epath.Path) -> tuple[Checkpoints, int, RunRecord]:
    """The checkpoints of a run, and step and run_record of the newest.

    Raises UserError where there is none, or where its run_record is damaged.
    """
    checkpoints = Checkpoints(run, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f'{run}: expected the workdir of a run, found no checkpoint')
    return checkpoints, steps[-1], checkpoints.record(steps[-1])


def load(run: epath.Path) -> tuple[Predictor, Any, RunRecord]:
    """Returns a run's predictor and parameters, and the run record that they are from.

    Raises UserError without a whole checkpoint.
    """
    checkpoints, step, run_record = newest(run)
    config, predictor = tasks.predictor_from_record(run_record)
    layout = make_layout(config, run_record['manifest']['num_shards'], make_mesh(jax.devices()[:1]))
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1))
    create_state = make_create_state(predictor.init, optimizer, layout)
    target = abstract_state(create_state, config.prng_impl, layout)
    return predictor, checkpoints.read(step, target).params, run_record


def predictions(
    predictor: Predictor, params: Any, texts: list[str], skip: bool
) -> Iterator[dict[str, Any]]:
    """What the model says of each text, in batches of one shape.

    Raises UserError for a text that can not be predicted from; with `skip` it is told and left out.
    """
    apply = jax.jit(predictor.apply)
    good = [
        (text, rows)
        for number, text in enumerate(texts, 1)
        if (rows := encoded(predictor, text, number, skip)) is not None
    ]
    parts = [good[first : first + ROWS] for first in range(0, len(good), ROWS)]

    def begun(part: list[tuple[str, dict[str, np.ndarray]]]) -> Any:
        missing = min(ROWS, len(good)) - len(part)  # rows of the last batch, filled up
        filled = [rows for _, rows in part + part[:1] * missing]
        batch = {name: np.concatenate([rows[name] for rows in filled]) for name in filled[0]}
        return apply(params, batch)

    results = map(begun, parts)
    result = next(results, None)
    for part in parts:
        arrays = jax.device_get(result)
        result = next(results, None)  # computed while this one is shown
        for row, (text, _) in enumerate(part):
            yield {'text': text, **predictor.show(arrays, row), **predictor.notes(text)}


def encoded(
    predictor: Predictor, text: str, number: int, skip: bool
) -> dict[str, np.ndarray] | None:
    """A text as one row; None for a bad one, of which it tells, or raises UserError."""
    try:
        if any('\ud800' <= letter <= '\udfff' for letter in text):  # see read_lines
            raise UserError(f'text 1, {text!a}: bytes that are not UTF-8, expected UTF-8')
        return predictor.encode([text])
    except KeyfoldError as error:
        problem = str(error).replace('text 1', f'text {number}', 1)
        if not skip:
            raise UserError(problem) from error
        print(f'skipped: {problem}', file=sys.stderr)
        return None


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
