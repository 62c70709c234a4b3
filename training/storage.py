"""What a run writes besides its checkpoints, and what storage answers, in one line."""

import contextlib
import re

from etils import epath

from configs.paths import in_bucket
from configs.schema import BadInput

# Of a bucket: the package that an error is from, or what gcsfs or TensorStore say in it.
NO_ANSWER = re.compile(
    r'^(aiohttp|gcsfs|google\.(api_core|auth)|requests)\b'
    '|Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED'
)


class NotSaved(BadInput):
    """Something that has to last could not be written."""

    exit_code = 5


def write_whole(file: epath.Path, data: bytes, mark: str = 'partial') -> None:
    """Writes a file that is seen whole or not at all, and its folder where that is missing.

    An object of a bucket is so by itself. Elsewhere `mark` tells apart who writes at the same time.
    """
    if in_bucket(file):
        file.write_bytes(data)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.parent / f'{file.name}.{mark}'
    try:
        partial.write_bytes(data)
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def brief(error: BaseException) -> str:
    """An exception's first line, or else its name."""
    return (str(error).splitlines() or [''])[0][:300] or type(error).__name__


def says_nothing_of_a_file(error: BaseException) -> bool:
    """Whether it is about the way to a file: no memory, no permission, no network."""
    if isinstance(error, MemoryError | PermissionError | ConnectionError | TimeoutError):
        return True
    return bool(NO_ANSWER.search(f'{type(error).__module__} {error}'))
