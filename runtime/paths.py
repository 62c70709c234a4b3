"""Paths that people give: on this machine, or in a bucket, as in gs://BUCKET/FOLDER.

epath reads and writes both. A bucket is behind a network and holds objects, no folders; what is
in the way of the first answer from it is told here.
"""

import importlib
import logging
import threading
from collections.abc import Callable

import fsspec.config
from etils import epath

from errors import Unavailable, UserError

PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}  # through which epath asks
NOTHING = 'no answer'
PATIENCE_SECONDS = 60.0  # for a first answer; some look for credentials, and try again, for long


def in_bucket(path: object) -> bool:
    """Whether a path is one of an object store."""
    return '://' in str(path)


def open_location(text: str, for_checkpoints: bool = False) -> epath.Path:
    """The absolute path, of something that need not be there.

    Raises UserError where a bucket can not be asked: no package, no credentials, no permission; and,
    `for_checkpoints`, no such bucket.
    """
    if not in_bucket(text):
        return epath.Path(text).expanduser().resolve()
    scheme, _, place = text.partition('://')
    bucket = place.partition('/')[0]
    package = PACKAGES.get(scheme)
    if not package or not bucket:
        raise UserError(f'{text}: expected a path, or one in a bucket as in gs://BUCKET/FOLDER')
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f'{text}: needs {package}; pip install -c requirements.txt {package}'
        ) from error
    for chatty in (package, 'fsspec', 'google'):  # what they fail at they also raise
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    for store in ('gcs', 's3'):  # or a list would stay what it was, whoever writes meanwhile
        fsspec.config.conf.setdefault(store, {})['use_listings_cache'] = False
    path = epath.Path(text)

    def ask() -> None:
        path.exists()
        if for_checkpoints:  # Orbax asks for it when it removes the first one
            importlib.import_module('google.cloud.storage').Client().get_bucket(bucket)

    if problem := _problem(ask):
        kind = Unavailable if problem.startswith(NOTHING) else UserError
        raise kind(f'{text}: can not be reached ({problem}); see docs/launch.md, Buckets')
    return path


def _problem(ask: Callable[[], None]) -> str:
    """What `ask()` fails with, and be it time; nothing where it does not."""
    problem = [f'{NOTHING} within {PATIENCE_SECONDS:.0f} s']

    def tell() -> None:
        try:
            ask()
            problem[0] = ''
        except Exception as error:  # of the network, the store, or the search for credentials
            problem[0] = ' '.join(str(error).split())[:300] or type(error).__name__

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return problem[0]
