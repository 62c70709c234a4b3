"""The recipes of docs/loggers.md pass a run's numbers on, shown on stand-ins of the libraries."""

import sys
import types
from typing import Any
from unittest import mock

import pytest
from etils import epath

from reporting.loggers import Logger
from tests.test_docs import FENCE, LISTING, runs

PAGE = (runs.ROOT / 'docs' / 'loggers.md').read_text()
RECIPES = {
    LISTING.match(text)[1]: text  # type: ignore[index]
    for language, text in FENCE.findall(PAGE)
    if language == 'python'
}


def logger_of(file: str, library: str, stand_in: Any) -> Logger:
    """Returns the logger that a recipe defines, with a stand-in for its library."""
    module = types.ModuleType('recipe')
    with mock.patch.dict(sys.modules, {library: stand_in}):
        exec(compile(RECIPES[file], file, 'exec'), module.__dict__)
    (kind,) = (x for x in vars(module).values() if isinstance(x, type) and x is not Logger)
    return kind(epath.Path('runs/reviews'))  # type: ignore[no-any-return]


def log_a_run(logger: Logger) -> None:
    """Makes the calls of a short run."""
    logger.scalars('train', 50, {'loss': 0.5, 'accuracy': 0.75})
    logger.flush()
    logger.hyperparameters(100, {'seed': 3}, ['evaluation/loss'])
    logger.text('evaluation/samples', 100, 'text')
    logger.scalars('evaluation', 100, {'loss': 0.25})
    logger.close()


@pytest.mark.parametrize('file', RECIPES)
def test_a_recipe_has_at_most_20_lines_of_code(file: str) -> None:
    lines = [line for line in RECIPES[file].splitlines() if line.strip()]
    code = [line for line in lines if not line.strip().startswith(('#', '"""'))]
    assert len(code) <= 20


def test_weights_and_biases_gets_every_point_and_the_options() -> None:
    wandb = mock.MagicMock()
    log_a_run(logger_of('reporting/wandb_logger.py', 'wandb', wandb))
    run = wandb.init.return_value
    assert run.log.mock_calls == [
        mock.call({'train/loss': 0.5, 'train/accuracy': 0.75}, step=50),
        mock.call({'evaluation/loss': 0.25}, step=100),
    ]
    run.config.update.assert_called_once_with({'seed': 3}, allow_val_change=True)
    run.finish.assert_called_once_with()
    assert wandb.init.call_args.kwargs['resume'] == 'allow'


@pytest.mark.parametrize('resumed', [False, True])
def test_mlflow_gets_every_point_and_the_options_in_one_run_per_workdir(resumed: bool) -> None:
    mlflow = mock.MagicMock()
    before = types.SimpleNamespace(info=types.SimpleNamespace(run_id='r1'))
    mlflow.search_runs.return_value = [before] if resumed else []
    log_a_run(logger_of('reporting/mlflow_logger.py', 'mlflow', mlflow))
    mlflow.start_run.assert_called_once_with(run_id='r1' if resumed else None)
    assert mlflow.log_metrics.mock_calls == [
        mock.call({'train/loss': 0.5, 'train/accuracy': 0.75}, step=50),
        mock.call({'evaluation/loss': 0.25}, step=100),
    ]
    mlflow.log_params.assert_called_once_with({'seed': 3})
    mlflow.end_run.assert_called_once_with()
