"""Compiles a config's training step for TPU slices, without a TPU, and reports its cost.

    make setup VENV=.venv-tpu ACCELERATOR=tpu       # once: TPUs need libtpu, and it its own jax
    .venv-tpu/bin/python -m tools.compile_for --config=FILE --topology=v5e:4x4

Compiles the trainer's own programs and runs none: the gradient for every width of a batch, the
update and the evaluation. (With optimizer.shard_state, of the update only what comes before and
after the optimizer, which itself needs no more.) Prints per device the memory, floating-point
operations and bytes moved between devices. --topology=cpu:8 stands for eight simulated devices.

Exit code 0: it fits, and only what the trainer sends moves. 1: it does not fit, or the compiler
moves something else. 2: bad input.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

import tasks
from configs.schema import Config
from input_pipeline.batches import Examples
from runtime import command_line, warm_start
from tasks.task import Task
from tools import slices
from tools.compiled import Compiled, compile_program
from training import zero
from training.mesh import Layout, make_layout, make_mesh
from training.optimizer import make_optimizer
from training.state import abstract_state, make_create_state
from training.step import make_eval_step, make_gradient, make_update

MIB, GIB = 2**20, 2**30
WHAT_HELPS = {
    'update': 'config.optimizer.shard_state=True, a smaller model, a chip with more memory',
    'gradient': (
        'a smaller config.batch_size, more config.num_shards (a device computes one shard at '
        'a time), shorter config.data.bucket_lengths, a narrower '
        'config.model.compute_dtype, config.model.remat=True, config.optimizer.shard_state=True, '
        'a smaller model'
    ),
    'evaluation': 'a smaller config.eval_batch_size',
}


class Program(NamedTuple):
    """A program of the step, with its abstract arguments."""

    name: str
    width: int  # of its batch; 0 without one
    function: Any
    arguments: tuple[Any, ...]
    beside: int  # bytes of the training state on each device that are not its arguments

    @property
    def title(self) -> str:
        """Returns its name in a table."""
        return f'{self.name}, width {self.width}' if self.width else self.name


Results = list[tuple[Program, Compiled]]


def main(config_flag: flags.FlagHolder[Any], topology: str) -> None:
    """Prints the report and exits."""
    config = command_line.checked_config(config_flag)
    slices.check(topology)
    # A cached program may name the source files of another copy of the project.
    jax.config.update('jax_enable_compilation_cache', False)
    devices = slices.devices(topology, config.matmul_precision)
    layout = make_layout(config, config.num_shards or len(devices), make_mesh(devices))
    chip = slices.CHIPS.get(topology.partition(':')[0])
    sys.exit(report(topology, config, layout, chip.hbm * GIB if chip else math.inf))


def report(topology: str, config: Config, layout: Layout, memory: float) -> int:
    """Compiles for devices with `memory` bytes and prints. Returns the exit code."""
    devices, task = layout.mesh.size, task_of(config)
    programs = list(step_programs(config, task, layout))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(programs[-1].arguments[0]))
    print(f'{topology}:', head(config, layout, parameters))

    columns = 'seconds', 'arguments', 'results', 'temporary', 'beside', 'MiB', 'MFLOP', 'counted'
    print(f'\n{"on each device":22}', *(f'{name:>10}' for name in columns))
    results = []
    for program in programs:
        compiled = compile_program(program.function, *program.arguments)
        print(row(program, compiled), flush=True)
        results.append((program, compiled))

    print(f'\n{"moves":22} {"by":>18} {"result":>12} {"received":>12}  from')
    print('\n'.join(moves(results, devices)), end='\n\n')
    verdicts = (judge_sum(results, devices, parameters), judge_origins(results),
                judge_memory(results, memory))  # fmt: skip
    print(*(text for _, text in verdicts), sep='\n')
    return 0 if all(good for good, _ in verdicts) else 1


def task_of(config: Config) -> Task:
    """Makes the task of a new run, with the tokenizer of the run that it starts from, if any."""
    return tasks.make_task(config, warm_start.origin_record(config))


def head(config: Config, layout: Layout, parameters: int) -> str:
    """Returns what is compiled, for which devices, with which versions."""
    device = layout.mesh.devices[0]
    libraries = ('jax', 'jaxlib', *(('libtpu',) if device.platform == 'tpu' else ()))
    versions = ', '.join(f'{name} {metadata.version(name)}' for name in libraries)
    hosts = len({device.process_index for device in layout.mesh.devices})
    return (
        f'{layout.mesh.size} x {device.device_kind} in {hosts} process(es); '
        f'{versions}\n{parameters:,} parameters; {layout.num_shards} shards of '
        f'{config.batch_size // layout.num_shards} examples, {layout.shards_per_device} on each '
        'device'
    )


def step_programs(config: Config, task: Task, layout: Layout) -> Iterator[Program]:
    """Yields the programs of a step and, last, that of an evaluation."""
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    create_state = make_create_state(task.init, optimizer, layout)
    state = abstract_state(create_state, config.prng_impl)
    beside = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state.opt_state)
    )

    def batch(examples: Examples, rows: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        one = examples.batch(np.zeros(1, np.int64), width)
        return {
            name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=layout.sharded)
            for name, x in one.items()
        }

    gradient = make_gradient(task.loss_sums, layout)
    for width in config.data.bucket_lengths:
        rows = batch(task.train, config.batch_size, width)
        args = (state.params, state.root_keys, state.step, rows)
        yield Program('gradient', width, gradient, args, beside)
    summed = jax.eval_shape(gradient, *args)
    if layout.shard_state:  # between these two is a program of one device
        grads, sums, prints = summed
        measure = zero.make_measure(layout)
        yield Program('update, before', 0, measure, (state.params, grads, sums), beside)
        slices, facts = jax.eval_shape(measure, state.params, grads, sums)
        rest = (slices, state.step, facts.norm, sums, prints)
        yield Program('update, after', 0, zero.make_finish(layout), (state.params, *rest), beside)
    else:
        update = make_update(optimizer, config.optimizer.clip_norm, layout)
        yield Program('update', 0, update, (state, *summed), 0)
    rows = batch(task.evaluation, config.eval_batch_size, width)
    evaluation = make_eval_step(task.eval_sums, layout)
    yield Program('evaluation', width, evaluation, (state.params, rows), beside)


def row(program: Program, compiled: Compiled) -> str:
    """Returns a line of the table."""
    parts = [*compiled.parts, program.beside] if compiled.parts else [None] * 4
    sizes = [f'{part / MIB:,.1f}' if part is not None else '-' for part in parts]
    needed = f'{(compiled.needed + program.beside) / MIB:,.1f}'
    flops = f'{compiled.flops / 1e6:,.0f}', f'{compiled.counted / 1e6:,.0f}'
    cells = (f'{compiled.seconds:.1f}', *sizes, needed, *flops)
    return ' '.join([f'{program.title:22}', *(f'{cell:>10}' for cell in cells)])


def moves(results: Results, devices: int) -> Iterator[str]:
    """Yields a line per collective; the widths of a program that agree share theirs."""
    groups: dict[Any, list[str]] = {}
    for program, compiled in results:
        groups.setdefault((program.name, compiled.moved), []).append(program.title)
    for (name, moved), titles in groups.items():
        who = titles[0] if len(titles) == 1 else f'{name}, {len(titles)} widths'
        for collective, count in Counter(moved).items():
            by = collective.name if count == 1 else f'{count} x {collective.name}'
            received = count * collective.received(devices)
            yield (
                f'{who:22} {by:>18} {count * collective.result:12,} {received:12,.0f}  '
                f'{collective.operation} in {collective.place}'
            )


def judge_sum(results: Results, devices: int, parameters: int) -> tuple[bool, str]:
    """Compares what a step moves with a ring all-reduce of the gradient. Always passes."""
    ring = 2 * 4 * parameters * (devices - 1) / devices
    if not ring:
        return True, 'one device: nothing moves'
    widest = {program.name: compiled for program, compiled in results}
    step = [c for name in widest if name != 'evaluation' for c in widest[name].moved]
    received = sum(collective.received(devices) for collective in step)
    largest = {
        name: max((c.result for c in step if c.name == name), default=0)
        for name in ('all-to-all', 'all-gather', 'all-reduce')
    }
    sizes = ', '.join(f'{name} {size:,}' for name, size in largest.items())
    return True, (
        f'a step: {received:,.0f} bytes received, {received / ring:.3f} of the {ring:,.0f} of a '
        f'ring all-reduce of the gradient; largest {sizes}'
    )


def judge_origins(results: Results) -> tuple[bool, str]:
    """Checks that only what training/ writes out moves, and for example no random numbers."""
    moved = [collective for _, compiled in results for collective in compiled.moved]
    foreign = Counter(c for c in moved if not c.of_trainer)
    if not foreign:
        return True, (
            'random numbers: nothing moves for them; every collective is written out in training/, '
            'and the compiler added none'
        )
    found = '; '.join(
        f'{count} x {c.name} from {c.operation or "an unknown operation"} in {c.place}'
        for c, count in foreign.items()
    )
    return False, f'moved, but not by training/, perhaps for random numbers: {found}'


def judge_memory(results: Results, memory: float) -> tuple[bool, str]:
    """Checks that every program fits in `memory` bytes, and says what helps if not."""
    sizes = {program.title: compiled.needed + program.beside for program, compiled in results}
    title = max(sizes, key=lambda name: sizes[name])
    needed = f'{title} needs {sizes[title] / GIB:,.2f} GiB'
    if math.isinf(memory):
        return (
            True,
            f'memory: {needed} on each device; simulated devices share the memory of the machine',
        )
    too_large = {name.split(',')[0] for name, size in sizes.items() if size > memory}
    if not too_large:
        return True, f'fits: {needed} of {memory / GIB:,.2f}, more than any other program'
    helps = next(text for name, text in WHAT_HELPS.items() if name in too_large)
    excess = (sizes[title] - memory) / GIB
    return False, (
        f'does not fit: {needed}, {excess:,.2f} more than the {memory / GIB:,.2f} of a device; '
        f'what helps: {helps}'
    )


if __name__ == '__main__':
    # Not defined above, since a test that imports this module has the flags of train.py, too.
    CONFIG = config_flags.DEFINE_config_file('config', None, 'What to compile.')
    TOPOLOGY = flags.DEFINE_string('topology', 'v5e:4x4', 'CHIP:SHAPE, or cpu:DEVICES.')
    command_line.run(lambda: main(CONFIG, TOPOLOGY.value))
