"""Exports a trained model, to predict without this project: with jax, NumPy and flatbuffers.

    python -m tools.export RUN --out=DIR
    python DIR/predict.py "i hated it"

DIR gets model.jax, the program for any number of texts on CPU, GPU and TPU (StableHLO, by
jax.export); parameters.npz, its arrays; run.json, config, vocabulary, labels and manifest of the
run; and predict.py, which reads them and shows how. The arrays are no constants of the program, or
XLA might fold them and round otherwise. DIR appears when it is whole.
"""

import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax import traverse_util

from errors import KeyfoldError, UserError
from reporting import log as logs
from runtime.checkpoints import RunRecord
from runtime.command_line import existing_run, refuse
from tasks.task import Predictor
from tools import predict, predict_exported
from tools.arguments import Arguments

PLATFORMS = ('cpu', 'cuda', 'tpu')
OF_TRAINING = ('labels', 'weights')  # in a row, but nothing to predict from


def main(argv: Sequence[str]) -> int:
    """Writes the folder; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('run', help='workdir of a run')
    parser.add_argument('--out', required=True, metavar='DIR', help='the folder to make')
    given = parser.parse_args(argv)
    logs.quiet_libraries()
    try:
        if Path(given.out).exists():
            raise UserError(f'--out={given.out}: expected a folder that is not there yet')
        predictor, params, run_record = predict.load(existing_run(given.run))
        write(Path(given.out), files(predictor, jax.device_get(params), run_record))
    except KeyfoldError as error:
        refuse(error)
    return 0


def files(predictor: Predictor, params: Any, run_record: RunRecord) -> dict[str, bytes]:
    """Name -> content of every file of the export."""
    flat = traverse_util.flatten_dict(params, sep='/')

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
        raise UserError(f'{error}: pip install flatbuffers, which jax.export needs') from error
    arrays = io.BytesIO()
    np.savez(arrays, allow_pickle=False, **flat)
    return {
        'model.jax': bytes(program),
        'parameters.npz': arrays.getvalue(),
        'run.json': json.dumps(run_record, indent=2).encode(),
        'predict.py': Path(predict_exported.__file__).read_bytes(),
    }


def any_row(predictor: Predictor, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """One encoded text, for the shapes: some word that the run knows."""
    lists = [fact for fact in facts.values() if isinstance(fact, list)]
    for word in (word for words in lists for word in words if isinstance(word, str)):
        try:
            return predictor.encode([word])
        except UserError:  # white space, say
            continue
    raise UserError('the vocabulary of the run has no word to predict from')


def write(out: Path, contents: dict[str, bytes]) -> None:
    """Makes the folder, whole or not at all. Raises UserError where it can not."""
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'{out.name}.') as folder:
            whole = Path(folder) / 'export'
            whole.mkdir()
            for name, content in contents.items():
                (whole / name).write_bytes(content)
            whole.replace(out)
    except OSError as error:
        raise UserError(f'--out={out}: can not be written ({error.strerror})') from error


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
