"""The Transformer as a classifier's encoder: its options, and the model that they describe."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs import schema
from configs.checks import at_least, one_of
from configs.schema import option
from errors import UserError
from model.transformer import Transformer


@dataclasses.dataclass
class TransformerOptions(schema.ModelConfig):
    """Declares the choice of the encoder, and what only a Transformer has (model/transformer.py).

    Of the LSTM's options, `hidden_size` is the size of its embeddings and layers, and `dropout`
    the rate wherever BERT has dropout after the embedding.
    """

    encoder: str = option('lstm', 'what reads the words', one_of('lstm', 'transformer'))
    num_layers: int = option(2, 'transformer: layers', at_least(1))
    num_heads: int = option(4, 'transformer: heads of attention in each layer', at_least(1))
    num_positions: int = option(512, 'transformer: the most tokens of a text', at_least(1))
    norm: str = option(
        'pre',
        "transformer: layer norm before each branch, or 'post', after it, as in BERT",
        one_of('pre', 'post'),
    )


def require_positions(options: TransformerOptions, width: int) -> None:
    """Raises UserError if texts of `width` tokens have more positions than the model."""
    if options.encoder == 'transformer' and width > options.num_positions:
        raise UserError(
            f'config.model.num_positions = {options.num_positions}: expected at least the longest '
            f'of config.data.bucket_lengths, {width}'
        )


def make_transformer(
    options: TransformerOptions, affixes: int, shared: Mapping[str, Any]
) -> Transformer:
    """Makes the model of a config, with the fields `shared` with the LSTM.

    Raises UserError for sizes that do not fit together.
    """
    if shared['hidden_size'] % options.num_heads:
        raise UserError(
            f'config.model.num_heads = {options.num_heads}: expected a divisor of '
            f'config.model.hidden_size = {shared["hidden_size"]}'
        )
    if affixes:
        raise UserError('config.data.affixes: expected (), since a Transformer has none')
    return Transformer(
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        num_positions=options.num_positions,
        norm=options.norm,
        **shared,
    )
