"""Classifies texts with a Transformer encoder, whose parameters can be those of BERT.

Vaswani et al., 2017, with the learned positions, GELU and dropout of BERT (Devlin et al., 2019).
Norms follow each residual sum as in BERT ('post'), or precede each branch ('pre'), which trains
from scratch more easily (Xiong et al., 2020).

Shapes: B batch, T time (tokens, padded), H hidden size, N heads, C classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.classifier import Classifier
from model.dropout import Dropout


class Block(nn.Module):
    """Self-attention and a layer of 4H units, each with a residual connection around it."""

    num_heads: int
    norm: str  # 'pre' or 'post'
    dropout: float
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns [B, T, H], of any value where padding is. tokens: [B, T, H], mask: bool[B, T]."""
        width, size = tokens.shape[1:]

        def dense(features: int, name: str, inputs: jax.Array) -> jax.Array:
            start = nn.initializers.xavier_uniform()
            return nn.Dense(features, dtype=self.dtype, kernel_init=start, name=name)(inputs)

        def dropped(name: str, values: jax.Array) -> jax.Array:
            return Dropout(self.dropout, name=name)(values, deterministic=not self.train)

        def attention(inputs: jax.Array) -> jax.Array:
            heads = (-1, width, self.num_heads, size // self.num_heads)
            query, key, value = (
                dense(size, name, inputs).reshape(heads) for name in ('query', 'key', 'value')
            )
            scores = jnp.einsum('bqnd,bknd->bnqk', query, key, preferred_element_type=jnp.float32)
            scores = scores / jnp.sqrt(size // self.num_heads)
            # Weights of padding are exactly zero, so its contents never reach a real token.
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
            weights = dropped('attention_dropout', nn.softmax(scores).astype(self.dtype))
            mixed = jnp.einsum('bnqk,bknd->bqnd', weights, value).reshape(tokens.shape)
            return dropped('mixed_dropout', dense(size, 'mixed', mixed))

        def feed_forward(inputs: jax.Array) -> jax.Array:
            inner = nn.gelu(dense(4 * size, 'inner', inputs), approximate=False)
            return dropped('outer_dropout', dense(size, 'outer', inner))

        for branch, name in ((attention, 'attention_norm'), (feed_forward, 'outer_norm')):
            norm = layer_norm(name, self.dtype)
            if self.norm == 'pre':
                tokens = tokens + branch(norm(tokens))
            else:
                tokens = norm(tokens + branch(tokens))
        return tokens


class Transformer(Classifier, kw_only=True):
    """Computes the class logits of padded token sequences, from the mean of the last layer.

    The contents of padded positions do not change a bit of the logits. With `remat`, only the
    inputs of each block are kept for the backward pass.
    """

    num_layers: int
    num_heads: int
    num_positions: int  # the most tokens of a text
    norm: str  # 'pre' or 'post'

    @nn.compact
    def __call__(self, token_ids: jax.Array, lengths: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits float32[B, C]. token_ids: int32[B, T], lengths: int32[B].

        Draws from the 'dropout' stream if `train`, otherwise from nothing.
        """

        def dropped(rate: float, name: str, values: jax.Array) -> jax.Array:
            return Dropout(rate, name=name)(values, deterministic=not train)

        def embedding(size: int, start: float, name: str) -> nn.Embed:
            init = nn.initializers.normal(start)
            return nn.Embed(
                size, self.hidden_size, embedding_init=init, dtype=self.dtype, name=name
            )

        token_ids = self.drop_words(token_ids, train)
        mask = jnp.arange(token_ids.shape[1]) < lengths[:, None]
        tokens = embedding(self.vocab_size, 0.3, 'embedding')(token_ids)
        tokens += embedding(self.num_positions, 0.1, 'positions')(jnp.arange(token_ids.shape[1]))
        if self.norm == 'post':
            tokens = layer_norm('embedding_norm', self.dtype)(tokens)
        tokens = dropped(self.embedding_dropout, 'embedding_dropout', tokens)
        block = nn.remat(Block) if self.remat else Block
        for layer in range(self.num_layers):
            tokens = block(
                self.num_heads, self.norm, self.dropout, train, self.dtype, name=f'layer_{layer}'
            )(tokens, mask)
        if self.norm == 'pre':
            tokens = layer_norm('norm', self.dtype)(tokens)
        total = jnp.sum(jnp.where(mask[..., None], tokens, 0), axis=1, dtype=jnp.float32)
        mean = total / jnp.maximum(lengths, 1)[:, None]
        mean = dropped(self.dropout, 'mean_dropout', mean.astype(self.dtype))
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name='logits')(mean)
        return logits.astype(jnp.float32)


def layer_norm(name: str, dtype: jnp.dtype) -> nn.LayerNorm:
    """Returns BERT's layer norm; its mean and variance are float32 for any dtype."""
    return nn.LayerNorm(epsilon=1e-12, dtype=dtype, name=name)
