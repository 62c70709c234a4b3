"""The run record of a checkpoint, as JSON with its own SHA-256. It is read without JAX."""

import hashlib
import json
from typing import Any

from etils import epath

# 'config', 'task' (facts; the manifest has its name), 'manifest', 'evaluations', 'sha256'
RunRecord = dict[str, Any]


def seal(run_record: RunRecord) -> RunRecord:
    """Returns the run record with the SHA-256 of its canonical JSON."""
    body = json.loads(json.dumps({k: v for k, v in run_record.items() if k != 'sha256'}))
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return body | {'sha256': digest}


def read_record(checkpoint: epath.Path) -> RunRecord:
    """Returns a checkpoint's run record. Raises ValueError if it was altered."""
    run_record = json.loads((checkpoint / 'run' / 'metadata').read_bytes())
    if not isinstance(run_record, dict) or seal(run_record) != run_record:
        raise ValueError('the run record (config, vocabulary, manifest) is not as written')
    return run_record
