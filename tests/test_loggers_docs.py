"""The recipes of docs/loggers.md pass a run's numbers on, shown on stand-ins of the libraries."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from etils import epath

from tests import runs

PAGE = (runs.ROOT / 'docs' / 'loggers.md').read_text()
RECIPES = re.findall(r'```python\n# reporting/\w+\.py\n(.*?)```', PAGE, re.DOTALL)


class Service:
    """A stand-in for a tracking service: records the calls that a recipe makes of its module."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, run_id: str | None) -> str:
        self.calls.append(('start', run_id))
        return run_id or 'id from the service'

    def end(self) -> None:
        self.calls.append('end')

    def wandb(self) -> SimpleNamespace:
        """Returns as much of the module `wandb` as its recipe uses, with the same signatures."""

        def init(project: str, id: str | None, resume: str) -> SimpleNamespace:
            assert (project, resume) == ('keyfold', 'allow')
            config = SimpleNamespace(update=update)
            return SimpleNamespace(
                id=self.start(id), define_metric=define, log=log, config=config, finish=self.end
            )

        def define(name: str, step_metric: str) -> None:
            assert (name, step_metric) == ('*', 'step')

        def log(data: dict[str, float]) -> None:
            self.calls.append((data['step'], {name: data[name] for name in data if name != 'step'}))

        def update(data: dict[str, Any], allow_val_change: bool) -> None:
            assert allow_val_change  # num_steps may have changed
            self.calls.append(data)

        return SimpleNamespace(init=init)

    def mlflow(self) -> SimpleNamespace:
        """Returns as much of the module `mlflow` as its recipe uses, with the same signatures."""

        def start_run(run_id: str | None) -> SimpleNamespace:
            return SimpleNamespace(info=SimpleNamespace(run_id=self.start(run_id)))

        def log_metrics(metrics: dict[str, float], step: int) -> None:
            self.calls.append((step, metrics))

        def log_text(text: str, artifact_file: str) -> None:
            assert (text, artifact_file) == ('    a', 'evaluation/samples/20.txt')

        return SimpleNamespace(
            start_run=start_run, log_metrics=log_metrics, log_text=log_text,
            set_tags=self.calls.append, end_run=self.end,
        )  # fmt: skip


@pytest.mark.parametrize('module', ['wandb', 'mlflow'])
def test_recipe_for_a_service_is_short_and_a_resumed_run_continues_there(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe,) = (text for text in RECIPES if f'import {module}\n' in text)
    assert len([line for line in recipe.splitlines() if line]) <= 20
    service, names = Service(), dict[str, Any]()
    monkeypatch.setitem(sys.modules, module, getattr(service, module)())
    exec(recipe, names)
    (kind,) = (value for name, value in names.items() if re.fullmatch('.+Logger', name))
    for step in (10, 20):
        logger = kind(epath.Path(tmp_path))
        logger.scalars('train', step, {'loss': 1 / step})
        logger.flush()
        logger.hyperparameters(step, {'num_steps': step}, ['evaluation/loss'])
        logger.text('evaluation/samples', 20, '    a')
        logger.close()
    assert service.calls == [
        ('start', None), (10, {'train/loss': 0.1}), {'num_steps': 10}, 'end',
        ('start', 'id from the service'), (20, {'train/loss': 0.05}), {'num_steps': 20}, 'end',
    ]  # fmt: skip
