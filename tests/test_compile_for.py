"""The promises of tools/compile_for.py: what moves, what is in memory, and what does not fit."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from errors import UserError
from model.classifier import TextClassifier
from tasks.classification import classifier_init, classifier_sums
from tests import runs
from tools import compile_for, compiled, slices
from tools.compiled import Collective, collectives, compile_program, with_origins
from training import keys
from training.mesh import Layout, make_mesh
from training.step import jit_on_mesh, make_gradient, reduce_over_devices

MakeLayout = Callable[..., Layout]
MakeClassifier = Callable[..., TextClassifier]

OPTIONS = {
    'num_shards': 8,
    'batch_size': 16,
    'eval_batch_size': 64,
    'data.num_train': 300,
    'data.num_eval': 100,
    'data.bucket_lengths': '(16,42)',
    'model.embedding_size': 192,
    'model.hidden_size': 128,
}
SUM = 'sum_scattered, training/reduction.py'
SCALARS = 'reduce_scalars, training/step.py'
CELLS = ('seconds', 'arguments', 'results', 'temporary', 'beside', 'MiB', 'MFLOP', 'counted')


@pytest.fixture(autouse=True)
def own_source_files() -> Iterator[None]:
    """A cached program that a copy of the project compiled names the files of that copy."""
    jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
    yield
    jax.config.update('jax_compilation_cache_include_metadata_in_key', False)


def run(topology: str, expected: int = 0, **overrides: Any) -> subprocess.CompletedProcess[str]:
    """Runs the tool for a small model; it must exit with `expected`."""
    named = {name.replace('__', '.'): value for name, value in overrides.items()}
    done = subprocess.run(
        [
            sys.executable, '-m', 'tools.compile_for',
            '--config=configs/reviews.py', f'--topology={topology}',
            *(f'--config.{name}={value}' for name, value in (OPTIONS | named).items()),
        ],
        cwd=runs.ROOT,
        env=runs.environment(1),
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout + done.stderr
    return done


def table(report: str) -> dict[str, dict[str, float]]:
    """Returns program -> column -> number, from the first table."""
    rows = re.findall(r'^(\w+(?:, width \d+)?) {2,}([\d.,]+(?: +[\d.,]+){7})$', report, re.M)
    return {
        name: dict(
            zip(CELLS, (float(x.replace(',', '')) for x in cells.split()), strict=True)
        )
        for name, cells in rows
    }  # fmt: skip


def check_report(report: str, devices: int) -> None:
    """Checks what holds for a step with the exact sum on any devices."""
    rows = table(report)
    assert list(rows) == [
        'gradient, width 16', 'gradient, width 42', 'update', 'evaluation, width 42'
    ]  # fmt: skip
    for cells in rows.values():
        parts = [cells[name] for name in ('arguments', 'results', 'temporary', 'beside')]
        assert cells['MiB'] == pytest.approx(sum(parts), abs=0.25)
        assert cells['arguments'] > 1
    # Matrix products follow the width; Adam's two moments lie beside all but the update.
    assert 2.4 < rows['gradient, width 42']['MFLOP'] / rows['gradient, width 16']['MFLOP'] < 2.8
    parameters = int(re.search(r'^([\d,]+) parameters', report, re.M)[1].replace(',', ''))
    assert rows['gradient, width 16']['beside'] == pytest.approx(8 * parameters / 2**20, abs=0.06)
    assert rows['update']['beside'] == 0

    found = re.findall(
        r'^(gradient|update|evaluation).* ([a-z-]+) +([\d,]+) +[\d,]+  (\w+) in (.*)$', report, re.M
    )
    padded = -(-(parameters + 4) // (1024 * devices)) * 1024 * devices
    assert sorted((*row[:2], int(row[2].replace(',', '')), *row[3:]) for row in found) == [
        # Four sums, and two labels by two.
        ('evaluation', 'all-gather', 4 * 8 * devices, 'all_gather', SCALARS),
        ('gradient', 'all-gather', 4 * padded, 'all_gather', 'gathered, training/reduction.py'),
        ('gradient', 'all-reduce', 8, 'psum', 'make_gradient, training/step.py'),
        ('gradient', 'all-to-all', 4 * padded, 'all_to_all', SUM),
        ('update', 'all-reduce', 4, 'psum', 'shared_fingerprint, training/fingerprint.py'),
    ]  # fmt: skip
    others = (devices - 1) / devices
    received = 2 * others * (4 * padded + 8 + 4)
    ratio = received / (2 * others * 4 * parameters)
    assert f'a step: {received:,.0f} bytes received, {ratio:.3f} of the' in report
    assert ratio < 1.03
    assert 'random numbers: nothing moves for them' in report


@pytest.mark.long
def test_report_for_simulated_devices_has_memory_and_the_bytes_of_a_ring() -> None:
    report = run('cpu:8').stdout
    check_report(report, 8)
    assert re.search(r'^memory: .* of the machine$', report, re.M)


@pytest.mark.long
def test_sharded_optimizer_state_moves_the_same_bytes_and_lies_in_slices() -> None:
    """Its leaves are of the small model, which fill a slice of 1024 numbers only in part."""
    report = run('cpu:8', optimizer__shard_state=True, model__hidden_size=128).stdout
    cells = table(report)['evaluation, width 42']
    assert cells['beside'] < 0.3 * cells['arguments']
    assert 'random numbers: nothing moves for them' in report
    assert re.search('^update, after +all-gather', report, re.M)
    ratio = float(re.search(r'bytes received, ([\d.]+) of the', report)[1])
    assert 1 <= ratio < 1.3


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed'
)


@pytest.mark.long
@needs_libtpu
def test_step_compiles_for_a_tpu_slice_into_a_true_all_gather() -> None:
    report = run('v5e:2x2').stdout
    check_report(report, 4)
    assert re.search(r'^fits: .* of 15.75', report, re.M)


@pytest.fixture
def tpu_layout() -> Iterator[MakeLayout]:
    """(topology) -> a layout on the devices of a TPU slice."""
    with mock.patch.dict(os.environ):

        def make(topology: str) -> Layout:
            mesh = make_mesh(slices.devices(topology, 'default'))
            return Layout(mesh, mesh.size, 'tree')

        yield make


@pytest.mark.long
@needs_libtpu
def test_program_that_does_not_fit_a_chip_is_reported_with_its_size(
    tpu_layout: MakeLayout,
) -> None:
    layout = tpu_layout('v5e:2x2')
    gib = jax.ShapeDtypeStruct((20, 2**18, 1024), jnp.float32, sharding=layout.replicated)
    refused = compile_program(jax.jit(lambda x: x + 1), gib)
    assert refused.parts == ()
    assert refused.needed == pytest.approx(40 * 2**30, rel=0.01)
    program = compile_for.Program('gradient', 16, None, (), 0)
    assert re.search(r'gradient, width 16 +[\d.]+( +-){4} +40,', compile_for.row(program, refused))
    good, text = compile_for.judge_memory([(program, refused)], slices.CHIPS['v5e'].hbm * 2**30)
    assert not good
    assert '24.25 more than the 15.75' in text


@pytest.mark.long
@needs_libtpu
@pytest.mark.parametrize('topology', ['v5e:8x8', 'v4:2x2x2', 'v5e:1x1'])
def test_bits_of_the_sum_are_gathered_as_whole_numbers(
    tpu_layout: MakeLayout, topology: str
) -> None:
    """On many chips the compiler makes a small all-gather an all-reduce, which adds zeros."""
    layout = tpu_layout(topology)
    program = jit_on_mesh(
        lambda x: reduce_over_devices(x, layout), layout, in_specs=(P('data'),), out_specs=P()
    )
    x = jax.ShapeDtypeStruct((layout.mesh.size,), jnp.float32, sharding=layout.sharded)
    hlo = program.lower(x).compile().as_text()
    assert not re.search(r' = f32\[[^ ]* all-(reduce|gather)', hlo)
    moved = compile_program(program, x).moved
    assert all(collective.of_trainer for collective in moved)
    assert [(c.name, c.operation) for c in moved] == {
        'v5e:8x8': [('all-to-all', 'all_to_all'), ('all-reduce', 'all_gather')],
        'v4:2x2x2': [('all-to-all', 'all_to_all'), ('all-gather', 'all_gather')],
        'v5e:1x1': [],
    }[topology]


@pytest.mark.long
@needs_libtpu
def test_sum_takes_little_more_memory_than_its_vector(tpu_layout: MakeLayout) -> None:
    """With the vector shaped before it is cut, as [P/2, 2], it took 64 times as much."""
    layout = tpu_layout('v5e:4x4')
    program = jit_on_mesh(
        lambda tree: reduce_over_devices(tree, layout), layout, in_specs=P(), out_specs=P()
    )
    shapes = {'embedding': (4_100, 300), 'head': (256, 2), 'hidden': (512, 256)}
    sizes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.replicated)
        for name, shape in shapes.items()
    }
    arguments, _, temporaries = compile_program(program, sizes).parts
    assert temporaries < 3 * arguments


@pytest.mark.parametrize('topology', ['v5e', 'v5e:3x3', 'v4:4x4', 'v9:2x2', 'cpu:0', 'cpu:x', ''])
def test_unknown_topology_is_refused_with_all_that_are_known(topology: str) -> None:
    with pytest.raises(UserError, match=r'v4: 2x2x1.*v5e: 1x1.*16x16; .*cpu:DEVICES') as refused:
        slices.check(topology)
    assert f'--topology={topology}: ' in str(refused.value)


def test_missing_libtpu_is_reported_with_how_to_install_it_beside_the_environment() -> None:
    advice = (
        r'libtpu.*make setup VENV=\.venv-tpu ACCELERATOR=tpu; .*\.venv-tpu/bin/python -m tools\.c'
    )
    with (
        mock.patch.object(importlib.util, 'find_spec', return_value=None),
        pytest.raises(UserError, match=advice) as error,
    ):
        slices.check('v5e:4x4')
    assert len(str(error.value)) < 390
    slices.check('cpu:8')


def gradient_moves(layout: Layout, model: TextClassifier) -> compiled.Compiled:
    """The gradient of a classifier, compiled for a small batch."""
    params = jax.eval_shape(classifier_init(model), keys.root_keys(0, 'threefry2x32').params)
    rows = jax.ShapeDtypeStruct((16,), jnp.int32)
    batch = {
        'token_ids': jax.ShapeDtypeStruct((16, 8), jnp.int32),
        'lengths': rows,
        'labels': rows,
        'weights': jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    gradient = make_gradient(classifier_sums(model), layout)
    return compile_program(gradient, params, keys.root_keys(0, 'threefry2x32'), jnp.int32(0), batch)


def test_step_with_dropout_moves_what_one_without_random_numbers_moves(
    layout: MakeLayout, classifier: MakeClassifier
) -> None:
    rates = {'word_dropout': 0.1, 'embedding_dropout': 0.2, 'dropout': 0.3}
    with_dropout = gradient_moves(layout(8), classifier(**rates))
    without = gradient_moves(layout(8), classifier())
    # In any order: the compiler schedules those that do not depend on each other.
    assert sorted(map(str, with_dropout.moved)) == sorted(map(str, without.moved))
    assert all(collective.of_trainer for collective in with_dropout.moved)


def test_bits_that_the_compiler_moves_are_reported(layout: MakeLayout) -> None:
    """As it does where a sharded array is drawn and threefry is not partitionable."""
    with jax.threefry_partitionable(False):
        draw = jax.jit(
            lambda key: jax.random.uniform(key, (8, 1024)), out_shardings=layout(8).sharded
        )
        drawn = compile_program(draw, keys.root_keys(0, 'threefry2x32').params)
    assert drawn.moved
    assert not any(collective.of_trainer for collective in drawn.moved)
    program = compile_for.Program('gradient', 16, None, (), 0)
    good, text = compile_for.judge_origins([(program, drawn)])
    assert not good
    assert 'collective-permute from split' in text


@pytest.mark.parametrize('place', ['TextClassifier, model/classifier.py', '', 'f, tools/x.py'])
def test_communication_outside_training_is_not_the_trainers(place: str) -> None:
    assert Collective('all-reduce', 4, 'psum', 'f, training/step.py').of_trainer
    assert not Collective('all-reduce', 4, 'psum', place).of_trainer
    assert not Collective('all-gather', 4, 'threefry2x32', 'fold, training/keys.py').of_trainer


HLO = """
  %a = f32[16,8]{1,0:T(8,128)S(1)} all-to-all(%x), dimensions={0}
  %b = (f32[2]{0}, f32[2]{0}) all-to-all(%x, %y), dimensions={0}
  %c = (f32[2,128]{1,0:T(8,128)}, bf16[8,128]{1,0}) all-gather-start(%x), dimensions={0}
  %d = bf16[8,128]{1,0} all-gather-done(%c)
  ROOT %e = (u32[2]{0}, pred[4]{0}) all-reduce-start(%x, %y), to_apply=%add
  %f = (s8[4]{0}, s8[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %g = f32[3]{0} reduce-scatter(%x), dimensions={0}
  %h = f32[3]{0} fusion(%all-gather), calls=%all-reduce
"""


def test_bytes_are_read_from_every_form_of_a_collective() -> None:
    assert [(c.name, c.result, c.received(4)) for c in collectives(HLO)] == [
        ('all-to-all', 512, 384),
        ('all-to-all', 16, 12),
        ('all-gather', 2048, 1536),
        ('all-reduce', 12, 18),
        ('collective-permute', 4, 4),
        ('reduce-scatter', 12, 36),
    ]


def test_collective_that_the_compiler_put_in_the_place_of_a_written_one_keeps_its_origin() -> None:
    gather = Collective('all-gather', 64, 'all_gather', SUM)
    total = Collective('all-reduce', 64, 'psum', SUM)
    unnamed = Collective('all-reduce', 64, '', '')
    assert list(with_origins([unnamed, total], [gather, total])) == [
        gather._replace(name='all-reduce'),
        total,
    ]
    small, combined = total._replace(result=8), unnamed._replace(result=72)
    assert list(with_origins([combined], [small, gather])) == [
        gather._replace(name='all-reduce', result=72)
    ]
    assert not next(with_origins([combined], [gather])).of_trainer
    for compiled_ones in ([unnamed, gather], [unnamed._replace(result=32)]):
        assert not next(with_origins(compiled_ones, [gather])).of_trainer
    assert not list(with_origins([unnamed, unnamed], [gather]))[1].of_trainer


def test_matrix_products_count_as_often_as_they_run(layout: MakeLayout) -> None:
    def device_program(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(carry @ jnp.ones((16, 16))), None

        return jax.lax.scan(jax.checkpoint(body), x, None, length=5)[0]

    program = jit_on_mesh(device_program, layout(4), in_specs=(P('data'),), out_specs=P('data'))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    assert compile_program(program, x).flops == 5 * 2 * (8 // 4) * 16 * 16


@pytest.mark.parametrize(
    ('name', 'helps'),
    [('gradient', 'config.batch_size'), ('update', 'smaller model'), ('evaluation', 'eval_batch')],
)
def test_what_does_not_fit_is_reported_with_its_excess(name: str, helps: str) -> None:
    gib = 2**30
    results = [
        (
            compile_for.Program(kind, 0, None, (), 2 * gib),
            compiled.Compiled(1.0, (15 if kind == name else 1) * gib, (), 0, 0, ()),
        )
        for kind in ('gradient', 'update', 'evaluation')
    ]
    good, text = compile_for.judge_memory(results, 15.75 * gib)
    assert not good
    assert f'does not fit: {name} needs 17.00 GiB, 1.25 more than the 15.75' in text
    assert helps in text
    assert compile_for.judge_memory(results, 17 * gib)[0]
    assert compile_for.judge_memory(results, math.inf)[0]
