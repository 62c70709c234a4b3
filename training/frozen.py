"""Leaves parts of a model out of the optimizer."""

from collections.abc import Sequence

import optax

from errors import UserError
from training.row import Tree


def without_frozen(
    rule: optax.GradientTransformation, parts: Sequence[str]
) -> optax.GradientTransformation:
    """Returns the rule for all but the `parts`, which do not change and have no optimizer state.

    Raises UserError for a part that the parameters do not have.
    """

    def frozen(params: Tree) -> Tree:
        if unknown := sorted(set(parts) - params.keys()):
            raise UserError(
                f'config.init.freeze: {unknown[0]!r}, expected among {", ".join(sorted(params))}'
            )
        return {name: name in parts for name in params}

    return optax.partition({False: rule, True: optax.set_to_zero()}, frozen) if parts else rule
