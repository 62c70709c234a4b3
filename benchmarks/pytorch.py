"""The step of configs/sst2_flax.py beside one in PyTorch: forward, backward and update.

Runs only where PyTorch is installed, which no requirement asks for (`pip install torch`). Both
train the same layers on a random batch of the same shape, on one device.
"""

from collections.abc import Callable

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import step
from benchmarks.common import Row, in_turn, ratio
from configs import sst2_flax
from configs.schema import Config
from input_pipeline.vocabulary import FIRST_WORD, UNK
from runtime import backend
from tasks.classification import ModelConfig
from training.mesh import make_layout, make_mesh

WIDTHS, ROUNDS = (8, 16, 32), 31


def measure() -> list[Row]:
    """Times both steps in turn, for texts of several padded widths."""
    backend.prepare()
    torch.set_num_threads(backend.usable_cores())
    config = sst2_flax.get_config()
    layout = make_layout(config, config.num_shards, make_mesh(jax.devices()[:1]))
    rows: list[Row] = []
    for width in WIDTHS:
        ours, theirs = step.prepared(config, layout, width), prepared(config, width)
        seconds = in_turn({'ours': ours, 'torch': theirs}, ROUNDS)
        rows += [
            (
                f'PyTorch {torch.__version__}, width {width}',
                1000 * float(np.median(seconds['torch'])),
                'ms',
            ),
            (f'ours over PyTorch, width {width}', ratio(seconds['ours'], seconds['torch']), ''),
        ]
    return rows


def prepared(config: Config, width: int) -> Callable[[], None]:
    """Returns a step with parameters, momentum and a batch of its own."""
    assert isinstance(config.model, ModelConfig)
    given, batch = config.optimizer, step.random_batch(config, width)
    ids, lengths, labels = (
        torch.from_numpy(batch[name].astype(np.int64))
        for name in ('token_ids', 'lengths', 'labels')
    )
    model = Classifier(config.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, given.learning_rate, given.momentum, weight_decay=given.weight_decay, fused=True
    )

    def one_step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(ids, lengths), labels).backward()
        optimizer.step()

    return one_step


class Classifier(nn.Module):
    """The layers of model/classifier.py: embedding, bidirectional LSTM, attention, two layers."""

    def __init__(self, config: ModelConfig) -> None:
        """Makes 5.46 M parameters; `nn.LSTM` has a second bias, which stays zero."""
        super().__init__()
        self.config, size = config, config.hidden_size
        self.embedding = nn.Embedding(step.WORDS, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, size, batch_first=True, bidirectional=True)
        for name, array in self.lstm.named_parameters():
            if 'bias_ih' in name:
                nn.init.zeros_(array).requires_grad_(False)
        self.keys, self.energy = nn.Linear(2 * size, size, False), nn.Linear(size, 1, False)
        self.hidden, self.logits = nn.Linear(2 * size, size), nn.Linear(size, 2, False)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """ids: int64[B, T], lengths: int64[B] -> logits float32[B, 2], with dropout."""

        def dropped(values: torch.Tensor) -> torch.Tensor:
            return functional.dropout(values, self.config.dropout)

        unknown = (torch.rand(ids.shape) < self.config.word_dropout) & (ids >= FIRST_WORD)
        words = self.embedding(torch.where(unknown, UNK, ids))
        words = functional.dropout(words, self.config.embedding_dropout)
        read = dropped(self.lstm(words)[0])
        scores = self.energy(torch.tanh(self.keys(read)))[..., 0]
        padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        attention = scores.masked_fill(padding, float('-inf')).softmax(-1)
        context = dropped(torch.bmm(attention[:, None], read)[:, 0])
        return self.logits(dropped(torch.tanh(self.hidden(context))))
