"""How a run lies on its devices: one mesh axis, the shards on it, the rows of each process."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import BadInput, Config

DATA = 'data'


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shard s of `num_shards` is worked through by device s // shards_per_device of the mesh."""

    mesh: Mesh
    num_shards: int
    reduction: str  # 'tree' or 'psum'

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

    def own_rows(self, global_rows: int) -> slice:
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

    def abstract(self, tree: Any) -> Any:
        """Shapes and dtypes of a tree, replicated on this mesh: what a checkpoint is read into."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), tree
        )


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """These devices, or all of all processes, on the axis 'data', each process's side by side."""
    ordered = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    # Auto axes: Linen's dropout does not run on the Explicit axes that jax.make_mesh makes.
    return Mesh(np.array(ordered), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))


def make_layout(config: Config, num_shards: int, mesh: Mesh) -> Layout:
    """Raises BadInput unless the devices divide the shards, and the shards the batches."""
    works = [2**k for k in range(num_shards.bit_length()) if num_shards % 2**k == 0]
    if num_shards & (num_shards - 1):
        raise BadInput(f'config.num_shards = {num_shards}: expected a power of two')
    if mesh.size not in works:
        raise BadInput(
            f'config.num_shards = {num_shards} can not be spread over {mesh.size} devices: '
            f'expected a device count of {", ".join(map(str, works))}'
        )
    for name in ('batch_size', 'eval_batch_size'):
        size = getattr(config, name)
        if size % num_shards:
            raise BadInput(
                f'config.{name} = {size}: expected a multiple of the {num_shards} shards, as in '
                f'{-(-size // num_shards) * num_shards}'
            )
    return Layout(mesh, num_shards, config.reduction)
