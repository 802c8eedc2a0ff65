"""What the submitting side was promised, and the comparison of that with rows and bucket at the end.

The ledger knows nothing of how the farm works: only which ids were accepted and how each must end. A job that ends
otherwise is lost, whatever its row says.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from uuid import UUID

from producer.jobs.contract import State
from producer.jobs.errors import FarmError
from producer.jobs.storage import Storage

READERS = 8


@dataclass(frozen=True)
class End:
    """How an accepted job must end."""

    state: State = State.SUCCEEDED
    code: str | None = None  # the row's error code, where it must fail


@dataclass
class Ledger:
    """The accepted ids, each with its end."""

    accepted: dict[UUID, End] = field(default_factory=dict)

    def accept(self, job_ids: Iterable[UUID], end: End) -> None:
        self.accepted |= dict.fromkeys(job_ids, end)


@dataclass
class Findings:
    """Where rows and bucket are not what the ledger says; each entry is a sentence."""

    lost: list[str] = field(default_factory=list)
    recorded_twice: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


def compare(ledger: Ledger, rows: Mapping[UUID, Any], successes: Mapping[UUID, int], storage: Storage) -> Findings:
    """Hold the ledger against rows and bucket, after the sweep.

    ``rows`` has state, error_code, object_key, sha256 and size_bytes of every job in the table, ``successes`` how many
    of its claims succeeded. Every row's object is read and its digest compared.
    """
    findings = Findings()
    for job_id, end in ledger.accepted.items():
        row = rows.get(job_id)
        if row is None or row["state"] != end.state or (end.code and row["error_code"] != end.code):
            found = "no row" if row is None else f"{row['state']} ({row['error_code']})"
            findings.lost.append(f"job {job_id}: {found} instead of {end.state} ({end.code})")
    findings.other += [f"job {job_id}: nobody was told of it" for job_id in rows.keys() - ledger.accepted.keys()]
    for job_id, row in rows.items():
        expected = 1 if row["state"] == State.SUCCEEDED else 0
        if successes.get(job_id, 0) != expected:
            findings.recorded_twice.append(f"job {job_id}: {row['state']}, {successes.get(job_id, 0)} claims succeeded")
    _compare_bucket(rows, storage, findings)
    return findings


def _compare_bucket(rows: Mapping[UUID, Any], storage: Storage, findings: Findings) -> None:
    kept = {row["object_key"]: row for row in rows.values() if row["state"] == State.SUCCEEDED}
    there = {key for page in storage.pages("") for key in page}
    findings.lost += [f"{key}: a row points to it, and the bucket has none" for key in kept.keys() - there]
    findings.other += [f"{key}: no row points to it, and the sweep left it" for key in there - kept.keys()]
    with ThreadPoolExecutor(READERS) as readers:
        wrong = readers.map(lambda key: _wrong(storage, key, kept[key]), sorted(kept.keys() & there))
        findings.lost += [problem for problem in wrong if problem]


def _wrong(storage: Storage, key: str, row: Any) -> str | None:
    try:
        body = storage.get(key)
    except FarmError as error:
        return f"{key}: {error}"
    if (sha256(body).hexdigest(), len(body)) != (row["sha256"], row["size_bytes"]):
        return f"{key}: is not what its row says"
    return None
