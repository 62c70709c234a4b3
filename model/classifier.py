"""Classifies texts: word dropout, embedding, bidirectional LSTM, attention over words, MLP head.

Follows the model of flax's sst2 example (https://github.com/google/flax/tree/main/examples/sst2).

Shapes: B batch, T time (words, padded), E embedding size, H hidden size, C classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.dropout import Dropout, WordDropout
from model.lstm import BidirectionalLSTM


class KeysOnlyAttention(nn.Module):
    """Weights each word by the word alone: softmax(v . tanh(W x)), without a query."""

    hidden_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, words: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns float32[B, T], zero outside the mask. words: [B, T, 2H], mask: bool[B, T]."""
        keys = nn.tanh(
            nn.Dense(self.hidden_size, use_bias=False, dtype=self.dtype, name='keys')(words)
        )
        scores = nn.Dense(1, use_bias=False, dtype=self.dtype, name='energy')(keys)[..., 0]
        scores = jnp.where(mask, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        return nn.softmax(scores)


class Classifier(nn.Module):
    """Holds the fields of every classifier of texts, and the dropout that they share."""

    vocab_size: int
    num_classes: int
    hidden_size: int
    word_dropout: float
    embedding_dropout: float
    dropout: float
    unk_id: int
    first_word_id: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def drop_words(self, token_ids: jax.Array, train: bool) -> jax.Array:
        """Returns int32[B, T], in training with dropped words unknown. token_ids: int32[B, T]."""
        layer = WordDropout(self.word_dropout, self.unk_id, self.first_word_id, name='word_dropout')
        return layer(token_ids, deterministic=not train)


class TextClassifier(Classifier, kw_only=True):
    """Computes the class logits of padded word sequences.

    The contents of padded positions do not change a bit of the logits: each LSTM direction starts
    at a true end, and attention gives padding a weight of exactly zero.
    """

    affix_sizes: tuple[int, ...]
    embedding_size: int

    @nn.compact
    def __call__(
        self,
        token_ids: jax.Array,
        lengths: jax.Array,
        affix_ids: jax.Array | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        """Returns logits float32[B, C]. token_ids: int32[B, T], lengths: int32[B].

        affix_ids: int32[B, T, A], prefixes and suffixes of the words, if the model embeds A of
        them. Their vectors are added to the word's (Bojanowski et al., 2017, add all n-grams).
        Draws from the 'dropout' stream only if `train`.
        """

        def dropout(rate: float, name: str, values: jax.Array) -> jax.Array:
            return Dropout(rate, name=name)(values, deterministic=not train)

        def embedded(ids: jax.Array, size: int, name: str) -> jax.Array:
            start = nn.initializers.normal(0.1)
            return nn.Embed(
                size, self.embedding_size, embedding_init=start, dtype=self.dtype, name=name
            )(ids)

        words = embedded(self.drop_words(token_ids, train), self.vocab_size, 'embedding')
        for n, size in enumerate(self.affix_sizes):
            assert affix_ids is not None
            words = words + embedded(affix_ids[..., n], size, f'affix_embedding_{n}')
        words = dropout(self.embedding_dropout, 'embedding_dropout', words)
        words = BidirectionalLSTM(self.hidden_size, self.dtype, self.remat, name='lstm')(
            words, lengths
        )
        words = dropout(self.dropout, 'lstm_dropout', words)
        mask = jnp.arange(token_ids.shape[1]) < lengths[:, None]
        attention = KeysOnlyAttention(self.hidden_size, self.dtype, name='attention')(words, mask)
        context = jnp.einsum('bt,btd->bd', attention.astype(self.dtype), words)
        context = dropout(self.dropout, 'context_dropout', context)
        hidden = nn.tanh(nn.Dense(self.hidden_size, dtype=self.dtype, name='hidden')(context))
        hidden = dropout(self.dropout, 'hidden_dropout', hidden)
        logits = nn.Dense(self.num_classes, use_bias=False, dtype=self.dtype, name='logits')(hidden)
        return logits.astype(jnp.float32)
