"""Splits parameters into those that are trained and those that are frozen.

Gradient, sums over devices and optimizer know the trained parts alone.
"""

from errors import UserError
from training.mesh import Layout
from training.row import Tree


def split(params: Tree, layout: Layout) -> tuple[Tree, Tree]:
    """Returns (trained parts, frozen parts) of a model's parameters, or of slices of them.

    Raises UserError for a part that the model does not have, or if none is left to train.
    """
    if not layout.frozen:
        return params, {}
    if unknown := sorted(set(layout.frozen) - params.keys()):
        raise UserError(
            f'config.init.freeze: {unknown[0]!r}, expected among {", ".join(sorted(params))}'
        )
    frozen = {name: params[name] for name in layout.frozen}
    if frozen.keys() == params.keys():
        raise UserError('config.init.freeze: all parts of the model, expected one or more to train')
    return {name: params[name] for name in params.keys() - frozen.keys()}, frozen


def joined(trained: Tree, frozen: Tree) -> Tree:
    """Undoes `split`."""
    return {**trained, **frozen} if frozen else trained
