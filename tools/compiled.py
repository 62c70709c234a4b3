"""What a program takes on one device once it is compiled: memory, operations, bytes moved."""

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
# Communication that somebody wrote, by the names of its operations in JAX.
WRITTEN = {
    'all_gather', 'all_to_all', 'pmax', 'pmin', 'ppermute', 'psum', 'psum_invariant',
    'psum_scatter', 'ragged_all_to_all', 'reduce_scatter',
}  # fmt: skip


class Collective(NamedTuple):
    """A collective instruction, which a compiled program may have several times."""

    name: str
    result: int  # bytes that it leaves on each device
    operation: str  # of JAX, that it comes from; '' where the compiler does not say
    place: str  # the innermost function of that, and its file: sum_devices, training/...

    def received(self, devices: int) -> float:
        """Bytes that a device gets from the others; in an all-reduce, as a ring does it."""
        others = (devices - 1) / devices
        if self.name == 'all-reduce':
            return 2 * others * self.result
        if self.name == 'reduce-scatter':
            return (devices - 1) * self.result
        return self.result if self.name.startswith('collective') else others * self.result

    @property
    def of_trainer(self) -> bool:
        """Whether training/ wrote it. Else the compiler put it there, to bring to a device what it
        needs of an operation that is spread over all: random numbers, say.
        """
        return self.operation in WRITTEN and ', training/' in self.place


class Compiled(NamedTuple):
    """What a program takes on one device. Sizes are in bytes."""

    seconds: float  # to compile it
    needed: int  # memory
    parts: tuple[int, ...]  # of it: arguments, results, temporaries and code; none if it is refused
    flops: int  # of its matrix products, as often as they run
    counted: float  # floating-point operations by the compiler's count, a loop's body once
    moved: tuple[Collective, ...]


def compile_program(program: Any, *args: Any) -> Compiled:
    """Compiles a jitted function for abstract arguments. Needs none of the devices it is for."""
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
    """Multiplications and additions of the matrix products in a traced program, inside shard_map
    those of one device. A scan counts as often as it runs, a while loop once.
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
    """The programs inside an operation, as in the body of a loop, from its parameters."""
    if hasattr(value, 'eqns'):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from inner_programs(item)


def collectives(hlo: str) -> Iterator[Collective]:
    """The collectives in the HLO text of a compiled program, each once, also inside a loop."""
    places = stack_places(hlo)
    for result, name, start, rest in INSTRUCTION.findall(hlo):
        sizes = [size_of(*shape) for shape in re.findall(r'([a-z]\w*)\[([\d,]*)\]', result)]
        if start and name == 'all-gather':
            sizes = sizes[len(sizes) // 2 :]  # its operands stand before its results
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
    """The collectives of a compiled program, of which the compiler may have left one unnamed that
    it put in the place of another, as for a small all-gather an all-reduce with zeros. That has the
    bytes of one `written` in the program before it was compiled, of which nothing else is left.
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
            same = [other for other in left if other.result == collective.result]
            if same:
                left.remove(same[0])
                collective = same[0]._replace(name=collective.name)
        yield collective


def size_of(dtype: str, dimensions: str) -> int:
    """Bytes of an array as HLO writes it: 'f32', '16,128'."""
    bits = re.search(r'\d+', dtype)  # pred has none, and is a byte
    count = math.prod(int(size) for size in dimensions.split(',') if size)
    return count * int(bits[0]) // 8 if bits else count


def stack_places(hlo: str) -> dict[str, str]:
    """stack_frame_id -> 'innermost function, its file', from the tables at the top of the text."""
    tables = {}
    for table in hlo.split('\n\n')[:8]:  # the program follows, and is long
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
