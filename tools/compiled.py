"""Compiles programs and reports their cost per device: memory, operations, bytes moved."""

import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

PROJECT = Path(__file__).resolve().parent.parent
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
INSTRUCTION = re.compile(
    r' = (\(.*?\)|\S+) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|'
    r'collective-broadcast|ragged-all-to-all)(-start)?\((.*)'
)
# The JAX operations that communicate because somebody wrote them.
WRITTEN = {
    'all_gather', 'all_to_all', 'pmax', 'pmin', 'ppermute', 'psum', 'psum_invariant',
    'psum_scatter', 'ragged_all_to_all', 'reduce_scatter',
}  # fmt: skip


class Collective(NamedTuple):
    """A collective instruction of a compiled program."""

    name: str
    result: int  # bytes that it leaves on each device
    operation: str  # of JAX, from which it comes; '' if the compiler does not say
    place: str  # innermost function of that operation, and its file: sum_devices, training/...

    def received(self, devices: int) -> float:
        """Returns the bytes that a device receives from the others; for an all-reduce in a ring."""
        others = (devices - 1) / devices
        if self.name == 'all-reduce':
            return 2 * others * self.result
        if self.name == 'reduce-scatter':
            return (devices - 1) * self.result
        return self.result if self.name.startswith('collective') else others * self.result

    @property
    def of_trainer(self) -> bool:
        """Returns whether training/ wrote it.

        Otherwise the compiler added it, to bring a device its part of an operation that is spread
        over all devices, such as drawing random numbers.
        """
        return self.operation in WRITTEN and ', training/' in self.place


class Compiled(NamedTuple):
    """The cost of a program on one device. Sizes are in bytes."""

    seconds: float  # to compile it
    needed: int  # memory
    parts: tuple[int, ...]  # arguments, results, temporaries and code; () if it does not fit
    flops: int  # of its matrix products, counted as often as they run
    counted: float  # floating-point operations as XLA counts them, a loop's body once
    moved: tuple[Collective, ...]


def compile_program(program: Any, *args: Any) -> Compiled:
    """Compiles a jitted function for abstract arguments, without the devices it is for."""
    traced = program.trace(*args)
    flops, lowered = matmul_flops(traced.jaxpr), traced.lower()
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r'([\d.]+)([KMGT])\b', str(error))
        if 'RESOURCE_EXHAUSTED' not in str(error) or not needed:
            raise
        size = int(float(needed[1]) * UNITS[needed[2]])
        return Compiled(time.perf_counter() - began, size, (), flops, 0, ())
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    parts = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
    )
    counted = compiled.cost_analysis().get('flops', 0)
    moved = with_origins(
        collectives(compiled.as_text()),
        collectives(lowered.as_text(dialect='hlo', debug_info=True)),
    )
    return Compiled(seconds, sum(parts), parts, flops, counted, tuple(moved))


def matmul_flops(jaxpr: Any) -> int:
    """Counts the multiplications and additions of the matrix products in a traced program.

    Inside shard_map these are of one device. A scan counts as often as it runs, a while loop once.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            ((contracted, _), _), left = equation.params['dimension_numbers'], equation.invars[0]
            depth = math.prod(left.aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        times = equation.params['length'] if equation.primitive.name == 'scan' else 1
        total += times * sum(matmul_flops(inner) for inner in inner_programs(equation.params))
    return total


def inner_programs(value: Any) -> Iterator[Any]:
    """Yields the programs in the parameters of an operation, such as the body of a loop."""
    if hasattr(value, 'eqns'):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from inner_programs(item)


def collectives(hlo: str) -> Iterator[Collective]:
    """Yields the collectives in the HLO text of a compiled program, those in a loop once."""
    places = stack_places(hlo)
    for result, name, start, rest in INSTRUCTION.findall(hlo):
        sizes = [size_of(*shape) for shape in re.findall(r'([a-z]\w*)\[([\d,]*)\]', result)]
        if start and name == 'all-gather':
            sizes = sizes[len(sizes) // 2 :]  # operands, results
        elif start and name == 'collective-permute':
            sizes = sizes[1:2]  # operand, result, context
        operation = re.search(r'op_name="(?:[^"]*/)?([^"/]*)"', rest)
        frame = re.search(r'stack_frame_id=(\d+)', rest)
        yield Collective(
            name,
            sum(sizes),
            operation[1] if operation else '',
            places[frame[1]] if frame else '',
        )


def with_origins(
    compiled: Iterable[Collective], written: Iterable[Collective]
) -> Iterator[Collective]:
    """Yields the collectives of a compiled program, unnamed ones with their origin if it is known.

    The compiler may replace a collective by an unnamed one, such as a small all-gather by an
    all-reduce with zeros, and combine it with another. It then has as many bytes as one or two that
    were `written` in the program before it was compiled, and that are not found otherwise.
    """
    found, left = list(compiled), []
    named = Counter((c.operation, c.place) for c in found)
    for collective in written:
        if named[collective.operation, collective.place]:
            named[collective.operation, collective.place] -= 1
        else:
            left.append(collective)
    for collective in found:
        if not collective.operation:
            for origins in (*zip(left, strict=True), *itertools.combinations(left, 2)):
                if sum(origin.result for origin in origins) == collective.result:
                    for origin in origins:
                        left.remove(origin)
                    largest = max(origins, key=lambda origin: origin.result)
                    collective = largest._replace(name=collective.name, result=collective.result)
                    break
        yield collective


def size_of(dtype: str, dimensions: str) -> int:
    """Returns the bytes of an array as HLO writes it: 'f32', '16,128'."""
    bits = re.search(r'\d+', dtype)  # pred has none and is a byte
    count = math.prod(int(size) for size in dimensions.split(',') if size)
    return count * int(bits[0]) // 8 if bits else count


def stack_places(hlo: str) -> dict[str, str]:
    """Returns stack_frame_id -> 'innermost function, its file', from tables at the top of HLO."""
    tables = {}
    for table in hlo.split('\n\n')[:8]:  # a long program follows
        title, _, rows = table.strip().partition('\n')
        tables[title] = dict(re.findall(r'^(\d+) "?(.*?)"?$', rows, re.M))

    def place(location: str) -> str:
        file, function = re.findall(r'(?:file|function)_name_id=(\d+)', location)
        path = tables['FileNames'][file].removeprefix(f'{PROJECT}/')
        return f'{tables["FunctionNames"][function].split(".")[0]}, {path}'

    locations = {name: place(row) for name, row in tables.get('FileLocations', {}).items()}
    return {
        frame: locations[row.split('=')[1].split()[0]]
        for frame, row in tables.get('StackFrames', {}).items()
    }
