"""Writes one text for another: an LSTM encoder-decoder that may read its own sampled tokens.

Follows the model of flax's seq2seq example (https://github.com/google/flax/tree/main/examples/
seq2seq), whose decoder draws every input itself. Here a coin decides at each step, which is
scheduled sampling (Bengio et al., 2015, https://arxiv.org/abs/1506.03099).

Shapes: B batch, T source time, U target time, E embedding size, H hidden size, V target ids.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.dropout import Dropout, WordDropout

LSTMState = tuple[jax.Array, jax.Array]  # (c, h), each [B, H]


def lstm_cell(remat: bool) -> type[nn.OptimizedLSTMCell]:
    """Returns the cell; with `remat` it keeps only c and h for the backward pass, no gates."""
    if not remat:
        return nn.OptimizedLSTMCell
    return nn.remat(nn.OptimizedLSTMCell, prevent_cse=False)  # a scan separates the passes already


def embed(vocab_size: int, size: int, dtype: jnp.dtype) -> nn.Embed:
    """Returns an embedding that starts with small vectors."""
    start = nn.initializers.normal(0.1)
    return nn.Embed(vocab_size, size, embedding_init=start, dtype=dtype)


class DecoderCell(nn.Module):
    """Performs one step of the decoder: reads a token and returns the logits of the next.

    It carries the state of the LSTM and its own prediction int32[B], which it reads next unless it
    is given the true token. It reads nothing else, so no later token can leak in.
    """

    vocab_size: int
    embedding_size: int
    hidden_size: int
    dropout: float
    pad_id: int
    eos_id: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Names every submodule by its attribute, so that its keys do not depend on order."""
        self.embedding = embed(self.vocab_size, self.embedding_size, self.dtype)
        self.lstm = lstm_cell(self.remat)(self.hidden_size, dtype=self.dtype)
        self.lstm_dropout = Dropout(self.dropout)
        self.logits = nn.Dense(self.vocab_size, dtype=self.dtype)

    def step(self, state: LSTMState, token: jax.Array, train: bool) -> tuple[LSTMState, jax.Array]:
        """Returns (state, logits float32[B, V]) after this token int32[B]. Draws no sample."""
        state, hidden = self.lstm(state, self.embedding(token))
        hidden = self.lstm_dropout(hidden, deterministic=not train)
        return state, self.logits(hidden).astype(jnp.float32)

    def sampled(
        self, carry: tuple[LSTMState, jax.Array], token: jax.Array, forcing: jax.Array, train: bool
    ) -> tuple[tuple[LSTMState, jax.Array], jax.Array]:
        """Reads the true token with probability `forcing`, a coin for each row, and otherwise
        what it drew itself at the step before. Both draws come from the 'sample' stream.
        """
        state, own = carry
        coin = jax.random.bernoulli(self.make_rng('sample'), forcing, token.shape)
        state, logits = self.step(state, jnp.where(coin, token, own), train)
        return (state, jax.random.categorical(self.make_rng('sample'), logits)), logits

    def greedy(
        self, carry: tuple[LSTMState, jax.Array], _: jax.Array
    ) -> tuple[tuple[LSTMState, jax.Array], jax.Array]:
        """Reads its own likeliest token; after EOS there is only padding."""
        state, own = carry
        state, logits = self.step(state, own, train=False)
        ended = (own == self.eos_id) | (own == self.pad_id)
        own = jnp.where(ended, self.pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return (state, own), own


class Seq2Seq(nn.Module):
    """Computes the logits of a target sequence from a source; also decodes without a target.

    Padding does not change a bit: the encoder starts at the true end of each source, and a step of
    the decoder sees only the steps before it.
    """

    source_vocab_size: int
    target_vocab_size: int
    embedding_size: int
    hidden_size: int
    word_dropout: float
    embedding_dropout: float
    dropout: float
    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int
    first_word_id: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Makes the submodules; each step of the decoder draws from its own keys."""
        self.word_dropped = WordDropout(self.word_dropout, self.unk_id, self.first_word_id)
        self.embedding = embed(self.source_vocab_size, self.embedding_size, self.dtype)
        self.source_dropout = Dropout(self.embedding_dropout)
        cell = lstm_cell(self.remat)(self.hidden_size, dtype=self.dtype)
        self.encoder = nn.RNN(cell, return_carry=True, reverse=True)
        sizes = (self.target_vocab_size, self.embedding_size, self.hidden_size)
        over_time = {
            'variable_broadcast': 'params',
            'split_rngs': {'params': False, 'dropout': True, 'sample': True},
            'out_axes': 1,
        }
        self.decoder = nn.scan(
            DecoderCell,
            methods={
                'step': over_time | {'in_axes': (1, nn.broadcast)},
                'sampled': over_time | {'in_axes': (1, nn.broadcast, nn.broadcast)},
                'greedy': over_time | {'in_axes': 0},
            },
        )(*sizes, self.dropout, self.pad_id, self.eos_id, self.dtype, self.remat)

    def __call__(
        self,
        sources: jax.Array,
        source_lengths: jax.Array,
        targets: jax.Array,
        forcing: jax.Array | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        """Returns logits float32[B, U, V]; `logits[:, u]` predict `targets[:, u]`.

        sources: int32[B, T], source_lengths: int32[B], targets: int32[B, U]. The decoder reads the
        targets before u. With `forcing` float32[], each of these is the true one with that
        probability and otherwise the model's own sample; without it, all are true and nothing is
        drawn from 'sample'. Draws from 'dropout' if `train`.
        """
        state = self.encode(sources, source_lengths, train)
        first = jnp.full(targets.shape[:1], self.bos_id, jnp.int32)
        before = jnp.concatenate([first[:, None], targets[:, :-1]], axis=1)
        if forcing is None:
            return self.decoder.step(state, before, train)[1]
        return self.decoder.sampled((state, first), before, forcing, train)[1]

    def greedy(self, sources: jax.Array, source_lengths: jax.Array, width: int) -> jax.Array:
        """Returns the likeliest token at each step, int32[B, width]; padding follows EOS."""
        state = self.encode(sources, source_lengths, train=False)
        first = jnp.full(sources.shape[:1], self.bos_id, jnp.int32)
        return self.decoder.greedy((state, first), jnp.arange(width))[1]

    def encode(self, sources: jax.Array, source_lengths: jax.Array, train: bool) -> LSTMState:
        """Returns the state after each source. sources: int32[B, T], source_lengths: int32[B].

        Reads a source from its true end to its start, which brings the first tokens of source and
        target close together (Sutskever et al., 2014, https://arxiv.org/abs/1409.3215).
        """
        sources = self.word_dropped(sources, deterministic=not train)
        words = self.source_dropout(self.embedding(sources), deterministic=not train)
        state, _ = self.encoder(words, seq_lengths=source_lengths)
        return state
