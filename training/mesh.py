"""Where a run computes: one mesh axis, its shards, and the batch rows of each process."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arrays import Batch, HostBatch, Tree
from configs.schema import Config
from errors import UserError

AXIS = 'data'

# A mesh of one device skips XLA's SPMD pipeline, whose early common-subexpression elimination
# leads to other fusions and so to other roundings. Without that pass both compile alike.
COMPILER_OPTIONS = {'xla_disable_hlo_passes': 'cse'}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Assigns shard s of `num_shards` to device s // shards_per_device of the mesh."""

    mesh: Mesh
    num_shards: int
    reduction: str  # 'tree' or 'psum'
    shard_state: bool = False  # each device keeps its shards' slices of the optimizer state
    frozen: tuple[str, ...] = ()  # parts of the model that are not trained

    @property
    def shards_per_device(self) -> int:
        """Returns how many consecutive shards a device processes, in sequence."""
        return self.num_shards // self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        """Returns the sharding in which every device holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def sharded(self) -> NamedSharding:
        """Returns the sharding in which every device holds its part of the leading axis."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def process_rows(self, global_rows: int) -> slice:
        """Returns the rows of a global batch that this process's devices hold."""
        parts = self.sharded.addressable_devices_indices_map((global_rows,)).values()
        starts = [part[0].indices(global_rows)[0] for part in parts if part is not None]
        return slice(min(starts), min(starts) + len(starts) * (global_rows // self.mesh.size))

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """Returns (trained parts, frozen parts) of a model's parameters, or of slices of them.

        Gradient, sums over devices and optimizer know the trained parts alone. Raises UserError for
        a part that the model lacks, or if none is left to train.
        """
        if unknown := sorted(set(self.frozen) - params.keys()):
            raise UserError(
                f'config.init.freeze: {unknown[0]!r}, expected among {", ".join(sorted(params))}'
            )
        trained = {name: part for name, part in params.items() if name not in self.frozen}
        if not trained:
            raise UserError(
                'config.init.freeze: all parts of the model, expected one or more to train'
            )
        return trained, {name: params[name] for name in self.frozen}

    def put(self, batch: HostBatch) -> Batch:
        """Moves this process's rows of a batch to its devices, as part of the global batch."""
        with jax.transfer_guard('allow'):  # this transfer is intended, unlike any other in the loop
            return jax.make_array_from_process_local_data(self.sharded, batch)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a one-axis mesh of `devices` (default: all), ordered by process."""
    ordered = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    # Auto axes: Linen's modules do not run on the Explicit ones of jax.make_mesh.
    return Mesh(np.array(ordered), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def make_layout(config: Config, num_shards: int, mesh: Mesh) -> Layout:
    """Makes the layout of a run.

    Raises UserError unless the number of devices is a power of two, at most `num_shards`, and the
    shards divide both batch sizes.
    """
    if mesh.size & (mesh.size - 1) or mesh.size > num_shards:
        raise UserError(
            f'{mesh.size} devices: expected a power of two, at most the {num_shards} shards of '
            'this run (config.num_shards); on GPUs, CUDA_VISIBLE_DEVICES=0,1,2,3 leaves four'
        )
    for name in ('batch_size', 'eval_batch_size'):
        size = getattr(config, name)
        if size % num_shards:
            raise UserError(
                f'config.{name} = {size}: expected a multiple of the {num_shards} shards, such as '
                f'{-(-size // num_shards) * num_shards}'
            )
    return Layout(
        mesh, num_shards, config.reduction, config.optimizer.shard_state, config.init.freeze
    )


def jit_on_mesh(
    program: Callable[..., Tree],
    layout: Layout,
    in_specs: Tree,
    out_specs: Tree,
    donate: tuple[int, ...] = (),
) -> Callable[..., Tree]:
    """Compiles `program` with shard_map: the same code on every device and layout.

    With check_vma=False the program owns every collective. Otherwise shard_map itself would sum
    the gradients of replicated parameters, in an order that depends on the number of devices.
    """
    mapped = jax.shard_map(
        program, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(  # a donated buffer is reused even if it is not read
        mapped, donate_argnums=donate, keep_unused=bool(donate), compiler_options=COMPILER_OPTIONS
    )
