"""Predicts with an exported model: `python predict.py "a text" "another one"`.

Needs jax, numpy and flatbuffers, and the other files of its folder. In your own program:

    from predict import load
    predict = load('DIR')
    predict(['a text', 'another one'])   # returns a dictionary for each text

The model is compiled once for each number of texts.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

PAD, UNK, BOS, EOS = range(4)
MARKS = ('<pad>', '<unk>', '<bos>', '<eos>')  # by id; the vocabulary follows
VOCABULARIES = ('source_vocabulary', 'target_vocabulary')
Predictions = list[dict[str, Any]]


def load(folder: str | Path) -> Callable[[Sequence[str]], Predictions]:
    """Returns the function texts -> predictions of a folder that tools.export wrote."""
    folder = Path(folder)
    model = jax.export.deserialize(bytearray((folder / 'model.jax').read_bytes()))
    with np.load(folder / 'parameters.npz', allow_pickle=False) as arrays:
        parameters = dict(arrays)
    run = json.loads((folder / 'run.json').read_text())
    task, width = run['task'], run['config']['data.bucket_lengths'][-1]
    apply = jax.jit(model.call)

    def classify(texts: Sequence[str]) -> Predictions:
        rows, *affixes = (
            [[BOS, *found[: width - 2], EOS] for found in encode(texts, ids, by_words, letters)]
            for ids, letters in zip([known, *of_affixes], [slice(None), *cuts], strict=True)
        )
        given = {'token_ids': padded(rows, width), 'lengths': lengths(rows)}
        if affixes:
            given['affix_ids'] = np.stack([padded(part, width) for part in affixes], axis=-1)
        probabilities, attention, *_ = jax.device_get(apply(parameters, given))
        return [
            {
                'label': task['label_names'][int(np.argmax(values))],
                'probabilities': dict(zip(task['label_names'], values.tolist(), strict=True)),
                'attention': list(
                    zip(text.split(), weights[1 : len(row) - 1].tolist(), strict=False)
                ),
            }
            for text, row, values, weights in zip(
                texts, rows, probabilities, attention, strict=True
            )
        ]

    def decode(texts: Sequence[str]) -> Predictions:
        rows = [[*found, EOS] for found in encode(texts, known, by_words)]
        for text, row in zip(texts, rows, strict=True):
            if UNK in row and run['config']['data.min_frequency'] == 1:
                raise ValueError(f'{text!r}: has tokens that are not in the vocabulary of the run')
            if len(row) > width:
                raise ValueError(f'{text!r}: needs a width of {len(row)}, expected at most {width}')
        given = {'sources': padded(rows, width), 'source_lengths': lengths(rows)}
        decoded = jax.device_get(apply(parameters, given)).tolist()
        texts_of = [[names[index] for index in row if index not in (PAD, EOS)] for row in decoded]
        return [{'prediction': (' ' if by_words else '').join(text)} for text in texts_of]

    by_words = run['config'].get('data.unit', 'word') == 'word'
    read, said = ('vocabulary',) * 2 if 'label_names' in task else VOCABULARIES
    known = numbered(task[read])
    of_affixes = [numbered(parts) for parts in task.get('affixes', [])]
    first, last = run['config'].get('data.affixes') or (0, 0)
    cuts = [slice(first), slice(-last, None)][: len(of_affixes)]
    names = (*MARKS, *task[said])
    return classify if 'label_names' in task else decode


def encode(
    texts: Sequence[str], ids: dict[str, int], by_words: bool, letters: slice = slice(None)
) -> list[list[int]]:
    """Returns the ids of words or characters, or of some letters of each. Raises ValueError."""
    if not all(text.strip() for text in texts):
        raise ValueError('expected texts that are not empty')
    return [
        [ids.get(word[letters], UNK) for word in (text.split() if by_words else text)]
        for text in texts
    ]


def numbered(words: Sequence[str]) -> dict[str, int]:
    """Returns word -> id."""
    return {word: index for index, word in enumerate(words, len(MARKS))}


def padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Returns rows as int32[B, width]."""
    return np.array([[*row, *[PAD] * (width - len(row))] for row in rows], np.int32)


def lengths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the lengths of rows as int32[B]."""
    return np.array([len(row) for row in rows], np.int32)


if __name__ == '__main__':
    if {'-h', '--help'} & set(sys.argv):
        print(__doc__)
        sys.exit()
    if not sys.argv[1:]:
        sys.exit('error: expected texts, as in: python predict.py "a text"')
    try:
        predictions = load(Path(__file__).parent)(sys.argv[1:])
    except ValueError as error:
        sys.exit(f'error: {error}')
    for prediction in predictions:
        print(json.dumps(prediction, ensure_ascii=False))
