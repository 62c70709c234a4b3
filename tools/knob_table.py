"""Prints docs/config.md: every field of a config, as configs/ declares it.

make docs        (python -m tools.knob_table >docs/config.md)
"""

import dataclasses
import sys
import typing
from collections.abc import Iterator
from typing import Any

from configs.schema import Config
from runtime.command_line import Arguments

HEAD = """\
# The fields of a config

Set one in a config file (`configs/`), or for one run with a flag: `--config.model.dropout=0.1`. A
field of type tuple takes `--config.data.bucket_lengths="(8,16,32)"`.

On **resume** a field that decides the trajectory of the run must be what it was; one marked *free*
may change. (`num_steps` may too, where the schedule has a length of its own: `optimizer.schedule =
'constant'`, or `optimizer.decay_steps`.)

Made by `make docs` from the declarations in `configs/`, where the checks are.
"""


def main(argv: list[str]) -> None:
    """Prints the page."""
    Arguments(__doc__).parse_args(argv)
    print('\n'.join(page()))


def page() -> Iterator[str]:
    """The lines of docs/config.md."""
    yield HEAD
    yield from table('Any run', Config, '')
    for name, kind in typing.get_type_hints(Config).items():
        sections: list[type] = [*typing.get_args(kind)] or [kind]
        for section in filter(dataclasses.is_dataclass, sections):
            yield ''
            yield from table(f'`{name}`: {section.__name__}', section, f'{name}.')


def table(title: str, section: Any, prefix: str) -> Iterator[str]:
    """One section: what it is for, and its options in order of declaration."""
    yield f'## {title}\n\n{section.__doc__.splitlines()[0]}\n'
    yield '| field | type | default | meaning | expected | resume |'
    yield '|---|---|---|---|---|---|'
    kinds = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if field.metadata:
            kind, check = kinds[field.name], field.metadata['check']
            cells = (
                f'`{prefix}{field.name}`',
                str(kind) if typing.get_args(kind) else kind.__name__,
                f'`{field.default!r}`',
                field.metadata['meaning'],
                check[1] if check else '',
                'free' if field.metadata['free'] else '',
            )
            yield f'| {" | ".join(cells)} |'


if __name__ == '__main__':
    main(sys.argv[1:])
