"""Scores of labels, weights of classes, the best metric, and when training stops early."""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import tasks
import train
from errors import UserError
from input_pipeline.batches import batch_order
from tasks import classification
from tasks.label_weights import label_weights, weights_of_examples
from tasks.scores import averages, label_counts, score_lines, scores
from tests.parameters import random_params
from tests.test_resume import small_config
from training.early_stopping import EarlyStopping, since_best
from training.evaluation import make_totals

# true a b c d: 4 3 0 1 examples; predicted: 3 4 1 0; label e neither.
CONFUSION = np.array(
    [[2, 2, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], float
)


def test_scores_are_those_of_scikit_learn() -> None:
    """Worked out by hand from its definitions, with zero_division=0."""
    counts = label_counts(CONFUSION)
    np.testing.assert_allclose(scores(*counts)[:, 0], [2 / 3, 2 / 4, 4 / 7])
    np.testing.assert_allclose(scores(*counts)[:, 1], [1 / 4, 1 / 3, 2 / 7])
    np.testing.assert_array_equal(scores(*counts)[:, 2:], 0)
    means = averages(*counts)
    np.testing.assert_allclose(means['macro'], [11 / 48, 5 / 24, 3 / 14])  # over a, b, c, d
    np.testing.assert_allclose(
        means['weighted'], [(4 * 2 / 3 + 3 / 4) / 8, 3 / 8, (4 * 4 / 7 + 3 * 2 / 7) / 8]
    )
    np.testing.assert_allclose(means['micro'], 3 / 8)
    lines = [line.split() for line in score_lines('abcde', *counts)]
    assert lines[1] == ['a', '0.6667', '0.5000', '0.5714', '4']
    assert lines[6] == ['macro', 'average', '0.2292', '0.2083', '0.2143', '8']


def test_scores_without_examples_are_zero() -> None:
    assert all((value == 0).all() for value in averages(*np.zeros((3, 2))).values())


@pytest.mark.parametrize('devices', [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_confusion_counts_every_example_once_on_any_layout(
    layout: Callable[..., Any],
    classifier: Callable[..., Any],
    token_batch: Callable[..., dict[str, np.ndarray]],
    devices: int,
) -> None:
    model, batches = classifier(), [token_batch(16, 9, seed) for seed in (0, 1)]
    params = random_params(classification.classifier_init(model))
    weights = np.repeat(np.float32([1, 0]), [27, 5])  # the last rows fill up the batch
    for batch, part in zip(batches, np.split(weights, 2), strict=True):
        batch['weights'] = part
    where = layout(devices)
    total = make_totals(classification.classifier_sums(model), where, lambda: iter(batches))
    found = total(jax.device_put(params, where.replicated))['confusion']
    expected = np.zeros((3, 3))
    apply = jax.jit(functools.partial(model.apply, train=False))
    for batch in batches:
        logits = apply({'params': params}, batch['token_ids'], batch['lengths'])
        predicted = np.argmax(logits, axis=-1)
        np.add.at(expected, (batch['labels'], predicted), batch['weights'])
    assert found.sum() == 27
    np.testing.assert_array_equal(found, expected)


def words(epoch: int) -> np.ndarray:
    """Stands in for the bits of an epoch's key."""
    return np.array([epoch, 7], np.uint32)


def test_weighted_epochs_draw_in_proportion_and_depend_on_the_key_and_the_epoch_alone() -> None:
    lengths, weights = np.ones(1000, np.int32), np.repeat([1.0, 9.0, 0.5], [800, 100, 100])

    def epoch(number: int, key: Callable[[int], np.ndarray] = words) -> np.ndarray:
        order = batch_order(lengths, 10, 4, key, weights)
        return np.concatenate([order(step) for step in range(100 * number, 100 * number + 100)])

    for number in (0, 3):
        rows = epoch(number)
        times = np.bincount(rows, minlength=1000)
        share = 1000 * weights / weights.sum()
        assert (np.floor(share) <= times).all()
        assert (times <= np.ceil(share)).all()
        np.testing.assert_array_equal(epoch(number), rows)
        # Neighbors of the file are not neighbors of the epoch, nor are an example's copies.
        assert np.mean(rows[1:] == rows[:-1]) < 0.05
        assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.15
    assert (np.bincount(epoch(0), minlength=1000) != np.bincount(epoch(1), minlength=1000)).any()
    assert (epoch(0) != epoch(0, lambda number: words(number + 1))).any()


def test_weighted_order_is_golden() -> None:
    order = batch_order(np.ones(20, np.int32), 20, 1, words, np.repeat([1.0, 3.0], [14, 6]))
    first = [18, 9, 13, 19, 14, 17, 15, 18, 17, 2, 5, 7, 16, 19, 4, 12, 16, 3, 15, 1]
    second = [0, 19, 19, 18, 3, 12, 15, 7, 2, 14, 16, 15, 16, 5, 6, 17, 11, 14, 17, 10]
    assert [order(0).tolist(), order(1).tolist()] == [first, second]


def test_equal_weights_draw_every_example_once() -> None:
    order = batch_order(np.ones(96, np.int32), 8, 3, words, np.full(96, 0.1))
    assert sorted(np.concatenate([order(step) for step in range(12)])) == list(range(96))


def test_weights_of_labels_are_balanced_or_named() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    find = weights_of_examples
    balanced = find('class_weights', ('balanced',), labels, 'abc')
    assert balanced is not None
    totals = [balanced[labels == label].sum() for label in range(3)]
    assert totals == [2, 2, 2]
    named = find('class_weights', ('b=2.5', 'a=3'), labels, 'abc')
    assert named is not None
    assert find('class_weights', (), labels, 'abc') is None
    assert named.tolist() == [3, 3, 3, 2.5, 1, 1]
    with pytest.raises(UserError, match=r"^config.data.class_weights: label 'd' is not among"):
        find('class_weights', ('d=2',), labels, 'abc')
    unknown = tuple(f'x{n}=2' for n in range(100))  # the first is named, at any hash seed
    with pytest.raises(UserError, match="label 'x0' is not among"):
        find('class_weights', unknown, labels, 'abc')
    accepts, _ = label_weights()
    for wrong in (('a',), ('a=0',), ('a=-1',), ('a=nan',), ('=2',), ('balanced', 'a=1')):
        assert not accepts(wrong)
    assert accepts(('a=b=2',))


def test_class_weights_are_row_weights_of_training_alone() -> None:
    config = small_config()
    data = dataclasses.replace(config.data, class_weights=('positive=3',))
    task = tasks.make_task(dataclasses.replace(config, data=data))
    rows = np.arange(20)
    batch = task.train.batch(rows, 42)
    assert set(batch['labels'].tolist()) == {0, 1}
    np.testing.assert_array_equal(batch['weights'], np.where(batch['labels'] == 1, 3, 1))
    np.testing.assert_array_equal(task.evaluation.batch(rows, 42)['weights'], 1)
    sums = jax.jit(lambda params: task.eval_sums(params, batch))(random_params(task.init))
    assert sums['tokens'] == batch['lengths'].sum()  # a speed, which weights do not change


def test_training_draws_by_the_sampling_weights_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*args: Any) -> Any:
        raise RuntimeError(args[-1])  # before the first step

    config = small_config()
    config.data = dataclasses.replace(config.data, sampling_weights=('positive=3',))
    labels = tasks.make_task(config).train.batch(np.arange(200), 42)['labels']
    make_task = tasks.make_task

    def unstarted(*args: Any) -> Any:  # whose parameters need no compiling
        return dataclasses.replace(make_task(*args), init=lambda _: {'kernel': jnp.zeros(1)})

    monkeypatch.setattr(tasks, 'make_task', unstarted)
    monkeypatch.setattr(train, 'train_batches', drawn)
    with pytest.raises(RuntimeError) as found:
        train.train(config, epath.Path(tmp_path))
    np.testing.assert_array_equal(found.value.args[0], np.where(labels == 1, 3, 1))


def test_best_metric_is_any_metric_of_the_task() -> None:
    def made(name: str) -> Any:
        return tasks.make_task(dataclasses.replace(small_config(), best_metric=name))

    assert made('').best_metric == 'accuracy'
    assert made('macro_f1').best_metric == 'macro_f1'
    by_loss = made('loss')
    totals = {'loss': 6.0, 'weight': 4.0, 'correct': 1.0}
    assert by_loss.metrics(totals)[by_loss.best_metric] == -1.5  # more is better
    with pytest.raises(UserError, match=r"^config.best_metric: 'makro_f1' .* mean 'macro_f1'"):
        made('makro_f1')


def test_training_stops_after_so_many_evaluations_without_a_better_one() -> None:
    nan = float('nan')
    cases: dict[tuple[float, ...], int] = {  # values -> evaluations until patience 2 stops
        (0.1, 0.2, 0.3, 0.4): 0,
        (0.1, 0.3, 0.3, 0.2, 0.9): 4,  # an equal one is no better one
        (nan, nan, nan): 3,
        (nan, 0.1, nan, 0.2, 0.1): 0,
        (0.5, 0.4, 0.6, 0.4, 0.5): 5,
    }
    for values, stops in cases.items():
        stopped, record = 0, dict[str, Any]()
        never = EarlyStopping('f1', 0, 'data', None)
        for step, value in enumerate(values, 1):
            # Each evaluation is by a process of its own, which has only the record.
            saved = json.loads(json.dumps(record)) if record else None
            patience = EarlyStopping('f1', 2, 'data', saved)
            patience.add(step, {'f1': value})
            record = {'evaluations': patience.evaluations}
            never.add(step, {'f1': value})
            if patience.ended:
                stopped = step
                break
        assert stopped == stops, values
        assert not never.ended
        other = EarlyStopping('f1', 2, 'other data', record)
        assert not other.ended
    counted = collections.Counter(step for step, _ in since_best([(1, 0.5), (2, 0.4), (3, 0.1)]))
    assert counted == {1: 1, 2: 1, 3: 1}
