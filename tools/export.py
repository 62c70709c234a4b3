"""Exports a trained model that predicts without this project.

    python -m tools.export RUN --out=DIR [--step N|best]
    python DIR/predict.py "i hated it"

DIR gets model.jax, the program for any number of texts on CPU, GPU and TPU (StableHLO, from
jax.export); parameters.npz; run.json with config, vocabulary, labels and manifest of the run; and
predict.py, which reads them and names the packages it needs. DIR appears once it is complete.
"""

import inspect
import io
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax import traverse_util

from errors import UserError
from input_pipeline import library_tokenizer, vocabulary
from runtime.run_record import RunRecord
from tasks.task import Predictor
from tools import predict_exported, saved_run
from tools.arguments import Arguments, one_line_errors, run_tool

PLATFORMS = ('cpu', 'cuda', 'tpu')
OF_PROJECT = r'(?m)^from input_pipeline\..*\n'  # imports
OF_TRAINING = ('labels', 'weights')  # in a row, but no input of a prediction


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Writes the folder; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('run', help='workdir of a run')
    parser.add_argument('--out', required=True, metavar='DIR', help='the folder to make')
    saved_run.add_step_argument(parser)
    given = parser.parse_args(argv)
    out = Path(given.out)
    if out.exists():
        raise UserError(f'--out={out}: exists already, expected a new folder')
    run = saved_run.open_run(given.run, given.step)
    predictor = run.predictor()
    params = jax.device_get(run.params(predictor.init))
    write(out, files(predictor, params, run.record))
    print(f'wrote {out}: step {run.step} of {run.folder}')
    return 0


def files(predictor: Predictor, params: Any, run_record: RunRecord) -> dict[str, bytes]:
    """Returns the files of the export, name -> content."""
    flat = traverse_util.flatten_dict(params, sep='/')

    # The parameters are arguments: XLA might fold constants, and then round differently.
    def model(flat: dict[str, jax.Array], rows: dict[str, jax.Array]) -> Any:
        return predictor.apply(traverse_util.unflatten_dict(flat, sep='/'), rows)

    (count,) = jax.export.symbolic_shape('texts')
    rows = {
        name: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)
        for name, x in any_row(predictor, run_record['task']).items()
        if name not in OF_TRAINING
    }
    try:
        program = jax.export.export(jax.jit(model), platforms=PLATFORMS)(flat, rows).serialize()
    except ImportError as error:
        raise UserError(
            f'{error}: .venv/bin/pip install flatbuffers, which jax.export needs'
        ) from error
    arrays = io.BytesIO()
    np.savez(arrays, allow_pickle=False, **flat)
    return {
        'model.jax': bytes(program),
        'parameters.npz': arrays.getvalue(),
        'run.json': json.dumps(run_record | {'jax': jax.__version__}, indent=2).encode(),
        'predict.py': program_text().encode(),
    }


def program_text() -> str:
    """Returns predict.py: tools/predict_exported.py and the modules it imports, in one file."""
    modules = (vocabulary, library_tokenizer, predict_exported)
    texts = [Path(inspect.getfile(module)).read_text() for module in modules]
    *imported, program = (re.sub(OF_PROJECT, '', text) for text in texts)
    doc, quotes, rest = program.rpartition('"""\n\nimport json')
    assert quotes
    return doc + '"""\n\n' + '\n\n'.join(imported) + '\nimport json' + rest


def any_row(predictor: Predictor, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """Encodes one text, for its shapes: a word from a vocabulary of the run."""
    words = [word for fact in facts.values() if isinstance(fact, list) for word in fact]
    for name, fact in facts.items():
        if name.endswith('tokenizer'):
            words += library_tokenizer.LibraryTokenizer(fact).words
    for word in (word for word in words if isinstance(word, str)):
        try:
            return predictor.encode([word])
        except UserError:  # such as white space
            continue
    raise UserError('the run record has no vocabulary with a word to predict on')


def write(out: Path, contents: dict[str, bytes]) -> None:
    """Makes the folder, completely or not at all. Raises UserError if it cannot."""
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'{out.name}.') as folder:
            whole = Path(folder) / 'export'
            whole.mkdir()
            for name, content in contents.items():
                (whole / name).write_bytes(content)
            whole.replace(out)
    except OSError as error:
        raise UserError(f'--out={out}: cannot be written ({error.strerror})') from error


if __name__ == '__main__':
    run_tool(main)
