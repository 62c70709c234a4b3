"""What a run writes besides its checkpoints, and what storage answers, in one line."""

import contextlib
import re

from etils import epath

from errors import KeyfoldError, Unavailable, UserError
from runtime.paths import in_bucket

# Of a bucket: the package that an error is from, or what gcsfs or TensorStore say in it.
REFUSED = re.compile(r'^google\.auth\b|Forbidden|PERMISSION_DENIED|UNAUTHENTICATED')
UNANSWERED = re.compile(
    r'^(aiohttp|gcsfs|google\.api_core|requests)\b|UNAVAILABLE|DEADLINE_EXCEEDED'
)


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


def is_access_error(error: BaseException) -> type[KeyfoldError] | None:
    """What an error is that says nothing of a file but of the way to it: no memory, no permission
    (UserError), no network (Unavailable). None for an error of the file itself.
    """
    if isinstance(error, MemoryError | PermissionError):
        return UserError
    if isinstance(error, ConnectionError | TimeoutError):
        return Unavailable
    told = f'{type(error).__module__} {error}'
    return UserError if REFUSED.search(told) else Unavailable if UNANSWERED.search(told) else None
