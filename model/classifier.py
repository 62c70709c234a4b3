"""A word-dropout text classifier: embedding, bidirectional LSTM, attention over words, MLP head.

Follows the model of flax's sst2 example (https://github.com/google/flax/tree/main/examples/sst2).

Shapes: B batch, T time (words, padded), E embedding size, H hidden size, C classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class WordDropout(nn.Module):
    """Replaces words by the unknown word, each with probability `rate`; none if deterministic.

    Ids below `first_word_id` (padding, sentence marks, unknown) are never replaced.
    """

    rate: float
    unk_id: int
    first_word_id: int

    @nn.compact
    def __call__(self, token_ids: jax.Array, *, deterministic: bool) -> jax.Array:
        """token_ids: int32[B, T] -> int32[B, T]."""
        if deterministic or self.rate == 0.0:
            return token_ids
        dropped = jax.random.bernoulli(self.make_rng('dropout'), self.rate, token_ids.shape)
        return jnp.where(dropped & (token_ids >= self.first_word_id), self.unk_id, token_ids)


class KeysOnlyAttention(nn.Module):
    """A weight for each word from the word alone: softmax(v . tanh(W x)), with no query."""

    hidden_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, words: jax.Array, mask: jax.Array) -> jax.Array:
        """words: [B, T, 2H], mask: bool[B, T] -> weights float32[B, T], zero where the mask is."""
        keys = nn.tanh(
            nn.Dense(self.hidden_size, use_bias=False, dtype=self.dtype, name='keys')(words)
        )
        scores = nn.Dense(1, use_bias=False, dtype=self.dtype, name='energy')(keys)[..., 0]
        scores = jnp.where(mask, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        return nn.softmax(scores)


def lstm_cell(remat: bool) -> type[nn.OptimizedLSTMCell]:
    """The cell, which with `remat` keeps c and h alone for the backward pass, no gates."""
    if not remat:
        return nn.OptimizedLSTMCell
    return nn.remat(nn.OptimizedLSTMCell, prevent_cse=False)  # a scan separates the passes already


class TextClassifier(nn.Module):
    """Class logits of padded word sequences.

    What stands in padded positions does not change a bit of the logits: the LSTM reads each
    direction from the true ends, and attention gives padding a weight of exactly zero.
    """

    vocab_size: int
    num_classes: int
    embedding_size: int
    hidden_size: int
    word_dropout: float
    embedding_dropout: float
    dropout: float
    unk_id: int
    first_word_id: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, token_ids: jax.Array, lengths: jax.Array, *, train: bool) -> jax.Array:
        """token_ids: int32[B, T], lengths: int32[B] -> logits float32[B, C].

        Draws from the 'dropout' stream when `train`, from nothing otherwise.
        """

        def dropout(rate: float, name: str) -> nn.Dropout:
            return nn.Dropout(rate, deterministic=not train, name=name)

        token_ids = WordDropout(
            self.word_dropout, self.unk_id, self.first_word_id, name='word_dropout'
        )(token_ids, deterministic=not train)
        embed = nn.Embed(
            self.vocab_size,
            self.embedding_size,
            embedding_init=nn.initializers.normal(0.1),
            dtype=self.dtype,
            name='embedding',
        )
        words = dropout(self.embedding_dropout, 'embedding_dropout')(embed(token_ids))
        words = self.bidirectional_lstm(words, lengths)
        words = dropout(self.dropout, 'lstm_dropout')(words)
        mask = jnp.arange(token_ids.shape[1]) < lengths[:, None]
        attention = KeysOnlyAttention(self.hidden_size, self.dtype, name='attention')(words, mask)
        context = jnp.einsum('bt,btd->bd', attention.astype(self.dtype), words)
        context = dropout(self.dropout, 'context_dropout')(context)
        hidden = nn.tanh(nn.Dense(self.hidden_size, dtype=self.dtype, name='hidden')(context))
        hidden = dropout(self.dropout, 'hidden_dropout')(hidden)
        logits = nn.Dense(self.num_classes, use_bias=False, dtype=self.dtype, name='logits')(hidden)
        return logits.astype(jnp.float32)

    def bidirectional_lstm(self, words: jax.Array, lengths: jax.Array) -> jax.Array:
        """words: [B, T, E] -> [B, T, 2H]."""
        make_cell = lstm_cell(self.remat)
        forward, backward = (  # named, since parameters get their keys from names, remat or not
            nn.RNN(make_cell(self.hidden_size, dtype=self.dtype, name=f'OptimizedLSTMCell_{i}'))
            for i in range(2)
        )
        both = nn.Bidirectional(forward, backward, name='lstm')(words, seq_lengths=lengths)
        return jnp.asarray(both)
