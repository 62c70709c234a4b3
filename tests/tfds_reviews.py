"""A small data set for TFDS: two texts and a label."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

ROWS = {
    'train': [('good', 'film', 1), (' bad ', 'film', 0), ('fine é', 'play', 1)],
    'validation': [('poor', 'play', 0)],
}


class Reviews(tfds.core.GeneratorBasedBuilder):
    """A data set that, by being defined, TFDS knows by name in this process: 'reviews'."""

    VERSION = tfds.core.Version('1.0.0')
    rows: ClassVar[Mapping[str, Sequence[tuple[Any, Any, int]]]] = ROWS

    def _info(self) -> Any:
        features = {
            'premise': tfds.features.Text(),
            'hypothesis': tfds.features.Text(),
            'label': tfds.features.ClassLabel(names=['no', 'yes']),
            'score': np.float32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self.rows}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (premise, hypothesis, label) in enumerate(self.rows[split]):
            yield (
                key,
                {'premise': premise, 'hypothesis': hypothesis, 'label': label, 'score': 1.0},
            )


def prepare_rows(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, premise: Any, hypothesis: Any, label: int
) -> None:
    """Prepares `reviews` with one more training example."""
    rows = {**ROWS, 'train': [*ROWS['train'], (premise, hypothesis, label)]}
    monkeypatch.setattr(Reviews, 'rows', rows)
    Reviews(data_dir=data_dir).download_and_prepare(file_format='array_record')
