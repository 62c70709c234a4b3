"""Files of a run, on this machine or in a bucket (gs://BUCKET/FOLDER), and why storage fails.

epath reads and writes both. A bucket holds objects, not folders, and is behind a network.
"""

import contextlib
import importlib
import logging
import os
import re
import threading
from collections.abc import Iterator

import fsspec.config
from etils import epath

from errors import RunError, Unavailable, UserError, first_line

PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}  # that epath needs to read a bucket
ANSWER_SECONDS = 60.0  # for the first answer; clients retry and look for credentials for longer

# gcsfs and TensorStore have no exception types for these: we search for their modules and codes.
REFUSED = re.compile(r'^google\.auth\b|Forbidden|PERMISSION_DENIED|UNAUTHENTICATED')
UNANSWERED = re.compile(
    r'^(aiohttp|gcsfs|google\.api_core|requests)\b'
    r'|\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|INTERNAL|UNKNOWN):'
)


def in_bucket(path: object) -> bool:
    """Returns whether a path is in an object store."""
    return '://' in str(path)


def open_location(text: str, for_checkpoints: bool = False) -> epath.Path:
    """Returns the absolute path; nothing needs to exist there. A bucket has answered once.

    Raises UserError for a name that is not the same bytes to Python as to TensorStore, which takes
    UTF-8: each would see another file. Raises UserError for a bucket that epath cannot read, that
    refuses, lacks its package or, `for_checkpoints`, does not exist; Unavailable for a network that
    fails and for a bucket that does not answer in time.
    """
    if not in_bucket(text):
        path = epath.Path(text).expanduser().resolve()
        if os.fsencode(path) != str(path).encode(errors='replace'):
            raise UserError(
                f'{str(path)!r}: expected a name in UTF-8 and a UTF-8 locale; rename the folder, '
                'or set LC_ALL=C.UTF-8'
            )
        return path
    scheme, _, place = text.partition('://')
    if scheme not in PACKAGES or place[:1] in ('', '/'):
        raise UserError(f'{text}: expected a path, or one in a bucket: gs://BUCKET/FOLDER')
    package, path = PACKAGES[scheme], epath.Path(text)
    try:
        importlib.import_module(package)
    except ImportError as error:
        install = f'.venv/bin/pip install -c requirements.txt {package}'
        raise UserError(f'{text}: needs {package}; {install}') from error
    for verbose in (package, 'fsspec', 'google'):  # they log what they also raise
        logging.getLogger(verbose).setLevel(logging.CRITICAL)
    for store in ('gcs', 's3'):  # a cached listing never shows what another process wrote
        fsspec.config.conf.setdefault(store, {})['use_listings_cache'] = False
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            path.exists()
            if for_checkpoints:  # Orbax needs this permission when it removes the first checkpoint
                client = importlib.import_module('google.cloud.storage').Client()
                client.get_bucket(place.partition('/')[0])
            answers.append(None)
        except Exception as error:  # of the network, the store, or the search for credentials
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not answers:
        raise Unavailable(f'{text}: no answer within {ANSWER_SECONDS:.0f} s; see docs/launch.md')
    if refusal := answers[0]:
        answered = getattr(refusal, 'code', None) in (401, 403, 404)  # trying again will not help
        kind = UserError if answered else access_error(refusal) or UserError
        problem = first_line(refusal)
        raise kind(f'{text}: cannot be reached ({problem}); see docs/launch.md') from refusal
    return path


def write_whole(file: epath.Path, data: bytes) -> None:
    """Writes a file so that readers see all of it or none of it; makes its folder if needed."""
    if in_bucket(file):  # an object is written whole anyway
        file.write_bytes(data)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.parent / f'{file.name}.partial'
    try:
        partial.write_bytes(data)
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def read_through(path: epath.Path) -> None:
    """Reads every file of a folder once. Raises OSError where one exists and cannot be read."""
    if path.is_dir():
        for child in path.iterdir():  # rglob would pass over a folder without permission
            read_through(child)
        return
    with contextlib.suppress(FileNotFoundError), path.open('rb') as file:
        while file.read(1 << 24):
            pass


def access_error(error: BaseException) -> type[RunError] | None:
    """Classifies an error of access, as opposed to one in what a file contains.

    Returns UserError for a missing permission; Unavailable for memory, threads, descriptors,
    devices and the network, since a restart may help; None for a missing file or bad contents.
    """
    link: BaseException | None = error
    while link is not None:
        text = f'{type(link).__module__} {link}'
        if isinstance(link, PermissionError) or REFUSED.search(text):
            return UserError
        missing = isinstance(link, FileNotFoundError)
        blocked = isinstance(link, OSError | MemoryError | RuntimeError) and not missing
        if blocked or UNANSWERED.search(text):
            return Unavailable
        link = link.__cause__ or link.__context__
    return None


@contextlib.contextmanager
def access_checked(path: epath.Path) -> Iterator[None]:
    """Turns an OSError inside into one line that names `path` and the cause."""
    try:
        yield
    except OSError as error:
        kind = access_error(error) or UserError
        raise kind(f'{path}: cannot be read or written ({first_line(error)})') from error
