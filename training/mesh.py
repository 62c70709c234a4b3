"""How a run lies on its devices: one mesh axis, the shards on it, the rows of each process."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import Config
from errors import UserError

DATA = 'data'

# A mesh of one device skips XLA's SPMD pipeline, whose early common-subexpression elimination
# leads to other fusions and so to other roundings. Without that pass both compile alike.
COMPILER_OPTIONS = {'xla_disable_hlo_passes': 'cse'}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shard s of `num_shards` is worked through by device s // shards_per_device of the mesh."""

    mesh: Mesh
    num_shards: int
    reduction: str  # 'tree' or 'psum'
    shard_state: bool = False  # each device has its shards' slices of the optimizer state

    @property
    def shards_per_device(self) -> int:
        """Consecutive shards that a device works through, one after the other."""
        return self.num_shards // self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def sharded(self) -> NamedSharding:
        """Every device holds its part of the leading axis."""
        return NamedSharding(self.mesh, PartitionSpec(DATA))

    def process_rows(self, global_rows: int) -> slice:
        """The rows of a global batch that this process's devices hold."""
        parts = self.sharded.addressable_devices_indices_map((global_rows,)).values()
        starts = [part[0].indices(global_rows)[0] for part in parts if part is not None]
        return slice(min(starts), min(starts) + len(starts) * (global_rows // self.mesh.size))

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch -> the global batch on the devices."""
        with jax.transfer_guard('allow'):  # a transfer on purpose; in a pod JAX takes it otherwise
            return {
                name: jax.make_array_from_process_local_data(self.sharded, rows)
                for name, rows in batch.items()
            }


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """These devices, or all of all processes, on the axis 'data', each process's side by side."""
    ordered = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    # Auto axes: Linen's dropout does not run on the Explicit axes that jax.make_mesh makes.
    return Mesh(np.array(ordered), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))


def make_layout(config: Config, num_shards: int, mesh: Mesh) -> Layout:
    """Raises UserError unless the devices divide the shards, and the shards the batches."""
    works = [2**k for k in range(num_shards.bit_length()) if num_shards % 2**k == 0]
    if num_shards & (num_shards - 1):
        raise UserError(f'config.num_shards = {num_shards}: expected a power of two')
    if mesh.size not in works:
        raise UserError(
            f'config.num_shards = {num_shards} can not be spread over {mesh.size} devices: '
            f'expected a device count of {", ".join(map(str, works))}'
        )
    for name in ('batch_size', 'eval_batch_size'):
        size = getattr(config, name)
        if size % num_shards:
            raise UserError(
                f'config.{name} = {size}: expected a multiple of the {num_shards} shards, as in '
                f'{-(-size // num_shards) * num_shards}'
            )
    return Layout(mesh, num_shards, config.reduction, config.optimizer.shard_state)


def jit_on_mesh(
    program: Callable[..., Any],
    layout: Layout,
    in_specs: Any,
    out_specs: Any,
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`program` on every device of the mesh, compiled alike for any number of them.

    check_vma=False: the program owns every collective. With the check on, shard_map itself would
    sum the gradients of replicated parameters, in an order of its own.
    """
    mapped = jax.shard_map(
        program, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(
        mapped,
        donate_argnums=donate,
        keep_unused=bool(donate),  # what is not read is still to be written over
        compiler_options=COMPILER_OPTIONS,
    )
