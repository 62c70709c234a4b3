"""Predicts with an exported model: `python predict.py "a text" "another one"`.

Needs numpy, flatbuffers, jax of the version in run.json or newer (and tokenizers, if run.json has
one), and the other files of its folder. In your own program:

    from predict import load
    predict = load('DIR')
    predict(['a text', 'another one'])   # returns a dictionary for each text

The model is compiled once for each number of texts.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.export
import numpy as np

from input_pipeline.library_tokenizer import restored
from input_pipeline.vocabulary import PAD, Vocabulary

Predictions = list[dict[str, Any]]


def load(folder: str | Path) -> Callable[[Sequence[str]], Predictions]:
    """Returns the function texts -> predictions of a folder that tools.export wrote."""
    folder = Path(folder)
    model = jax.export.deserialize(bytearray((folder / 'model.jax').read_bytes()))
    with np.load(folder / 'parameters.npz', allow_pickle=False) as arrays:
        parameters = dict(arrays)
    run = json.loads((folder / 'run.json').read_text())
    task, config = run['task'], run['config']
    width = config['data.bucket_lengths'][-1]
    kind = config.get('data.tokenizer') or config.get('data.unit', 'word') + 's'
    apply = jax.jit(model.call)

    def chosen(probabilities: np.ndarray) -> dict[str, Any]:
        if 'label_names' in task:
            return {'label': names[int(np.argmax(probabilities))]}
        return {'labels': [names[index] for index in np.flatnonzero(probabilities > 0.5)]}

    def classify(texts: Sequence[str]) -> Predictions:
        rows, *of_affixes = (
            [vocabulary.marked(part.ids(text), width) for text in not_empty(texts)]
            for part in (vocabulary, *affixes)
        )
        given = {'token_ids': padded(rows, width), 'lengths': lengths(rows)}
        if affixes:
            given['affix_ids'] = np.stack([padded(part, width) for part in of_affixes], axis=-1)
        probabilities, *attention = jax.device_get(apply(parameters, given))
        found: Predictions = [
            {
                **chosen(values),
                'probabilities': dict(zip(names, values.tolist(), strict=True)),
            }
            for values in probabilities
        ]
        for weights in attention:  # of the LSTM; a Transformer has none to show
            for text, prediction, each in zip(texts, found, weights.tolist(), strict=True):
                pieces = [piece for _, piece in vocabulary.tokens(text)[: width - 2]]
                prediction['attention'] = list(zip(pieces, each[1:], strict=False))
        return found

    def decode(texts: Sequence[str]) -> Predictions:
        rows = []
        for text in not_empty(texts):
            ids = source.ids(text)
            if source.unk in ids and config['data.min_frequency'] == 1:
                raise ValueError(f'{text!r}: has tokens that are not in the vocabulary of the run')
            if len(ids) >= width and config['data.too_long'] != 'cut':
                raise ValueError(f'{text!r}: needs a width of {len(ids) + 1}, expected <= {width}')
            rows.append(source.marked(ids, width, start=False))
        given = {'sources': padded(rows, width), 'source_lengths': lengths(rows)}
        decoded = jax.device_get(apply(parameters, given))
        return [{'prediction': target.decode(row)} for row in decoded]

    if names := task.get('label_names') or task.get('labels'):
        vocabulary = restored(task, kind)
        first, last = config.get('data.affixes') or (0, 0)
        affixes = [
            Vocabulary(words, vocabulary.units, letters)
            for words, letters in zip(
                task['affixes'], (slice(first), slice(-last, None)), strict=False
            )
        ]
        return classify
    source, target = (restored(task, kind, side) for side in ('source_', 'target_'))
    return decode


def not_empty(texts: Sequence[str]) -> Sequence[str]:
    """Returns the texts. Raises ValueError if one is empty."""
    if not all(text.strip() for text in texts):
        raise ValueError('expected texts that are not empty')
    return texts


def padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Returns rows as int32[B, width]."""
    return np.array([[*row, *[PAD] * (width - len(row))] for row in rows], np.int32)


def lengths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the lengths of rows as int32[B]."""
    return np.array([len(row) for row in rows], np.int32)


def refuse(problem: object) -> NoReturn:
    """Ends the program with one line of at most 400 characters and exit code 2."""
    line = ' '.join(f'error: {problem}'.split())
    if len(line) > 400:  # its end often says what to do
        line = f'{line[:262]} ... {line[-133:]}'
    print(line, file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
    if {'-h', '--help'} & set(sys.argv):
        print(__doc__)
        sys.exit()
    if not sys.argv[1:]:
        refuse('expected texts, as in: python predict.py "a text"')
    try:
        predictions = load(Path(__file__).parent)(sys.argv[1:])
    except ValueError as error:
        refuse(error)
    except jax.errors.JaxRuntimeError as error:
        needed = json.loads((Path(__file__).parent / 'run.json').read_text())['jax']
        refuse(
            f'jax {jax.__version__} cannot run the model ({str(error).splitlines()[0]}), which was '
            f'exported with jax {needed}; expected that version or newer'
        )
    for prediction in predictions:
        print(json.dumps(prediction, ensure_ascii=False))
