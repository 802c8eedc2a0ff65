"""How what is handed in becomes rows: keys that came before, lanes, and one COPY for all jobs, the fastest way in.

All of it happens in the submitting transaction, which ``submissions`` begins; what is raised here undoes it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from psycopg.types.json import Json
from sqlalchemy import Connection, text

from producer.jobs import prompt_words
from producer.jobs.contract import Entry, Priority, Rejection, Submission, SubmissionKey
from producer.jobs.errors import Deleted, KeyAtWork, KeyReused, TooManyJobs, TooManyRejections
from producer.jobs.postgres import as_owner
from producer.jobs.prompt_words import WordRows

JOBS_MAX = 1_000_000
"""Of one batch: a small file can stand for many more."""
REJECTIONS_MAX = 100_000
"""Lines of one input that became no job. They are held in memory."""
REJECTED_MAX_CHARACTERS = 50_000_000
"""Of all that those lines held."""


def came_before(connection: Connection, tenant: str, key: SubmissionKey | None, **ids: UUID) -> Any:
    """What came of this key when it came before; None, with the key kept for ``ids``, if it is new.

    Raises: KeyReused; Deleted; KeyAtWork: another transaction submits with the same key at this moment.
    """
    if key is None:
        return None
    if not connection.scalar(_LOCK_KEY, {"tenant": tenant, "key": key.key}):
        raise KeyAtWork(key.key)
    values = {"tenant": tenant, "key": key.key, "fingerprint": key.fingerprint, "job_id": None, "batch_id": None} | ids
    earlier = None
    while earlier is None:  # it may be pruned between the two
        if connection.execute(_KEEP_KEY, values).rowcount:
            return None
        earlier = connection.execute(_EARLIER, values).one_or_none()
    if earlier.fingerprint != key.fingerprint:
        raise KeyReused(key.key)
    if earlier.job_id is None and earlier.batch_id is None:
        raise Deleted(key.key)
    return earlier


def drawn_before(connection: Connection, submission: Submission, tenant: str) -> UUID | None:
    """The job that drew this very image with a model that the farm has now. One without a seed is drawn anew."""
    if submission.seed is None:
        return None
    values = {"tenant": tenant, "fingerprint": _fingerprint(submission.request().model_dump_json())}
    found: UUID | None = connection.execute(_DRAWN, values).scalar()
    return found


def single_lane(connection: Connection, tenant: str, priority: Priority) -> int:
    """The lane of the jobs that the tenant submits alone, open, and not to be closed before the commit.

    One that is open already is locked together with others who submit, so that none waits for another.
    """
    values = {"tenant": tenant, "priority": priority.rank}
    found = connection.execute(_OPEN_SINGLE_LANE, values).scalar()
    return int(found or connection.execute(_SINGLE_LANE, values).scalar_one())


def batch_lanes(connection: Connection, tenant: str, batch_id: UUID) -> dict[Priority, int]:
    """A lane of each priority, since nothing else can be asked while rows are copied; the unused close soon."""

    def opened(priority: Priority) -> int:
        values = {"tenant": tenant, "batch": batch_id, "priority": priority.rank}
        return int(connection.execute(_BATCH_LANE, values).scalar_one())

    return {priority: opened(priority) for priority in Priority}


@dataclass(frozen=True)
class Destination:
    """What the jobs that are inserted together have in common."""

    tenant: str
    batch_id: UUID | None
    lanes: Mapping[Priority, int]
    max_failures: int
    previews: int = 0


def without_rejections(
    entries: Iterable[Submission | Entry | Rejection], rejections: list[Rejection]
) -> Iterator[Submission | Entry]:
    """The jobs to be, while the others gather in ``rejections``. Raises: TooManyRejections."""
    characters = 0
    for entry in entries:
        if isinstance(entry, Rejection):
            rejections.append(entry)
            characters += len(json.dumps(entry.source)) + len(entry.message)
            if len(rejections) > REJECTIONS_MAX or characters > REJECTED_MAX_CHARACTERS:
                raise TooManyRejections(REJECTIONS_MAX)
        else:
            yield entry


def insert_rejections(connection: Connection, tenant: str, batch_id: UUID, rejections: Sequence[Rejection]) -> None:
    if rejections:
        rows = [
            {"tenant": tenant, "batch": batch_id, **vars(rejection), "source": Json(rejection.source)}
            for rejection in rejections
        ]
        connection.execute(_INSERT_REJECTION, rows)


def _fingerprint(request_json: str) -> bytes:
    """By which equal requests with equal seeds are found."""
    return hashlib.sha256(request_json.encode()).digest()


class _Row(NamedTuple):
    """A job as it is inserted. The names are those of the columns, from which the COPY is written."""

    id: UUID
    tenant: str
    batch_id: UUID | None
    lane_id: int
    position: int
    line: int | None
    source: Json | None
    name: str | None
    priority: int
    work: float
    request: str
    fingerprint: bytes
    max_failures: int
    previews: int


_COPY_JOBS = f"COPY jobs ({', '.join(_Row._fields)}) FROM STDIN"


def copy_jobs(
    connection: Connection,
    to: Destination,
    entries: Iterable[Submission | Entry],
    ids: Sequence[UUID] | None = None,
) -> tuple[int, int]:
    """Insert the jobs through COPY, the fastest way in; returns how many there were, and of how many lines. Those of
    one line come together. Raises: TooManyJobs."""
    count = lines = 0
    last_line = None
    with WordRows(to.tenant, to.batch_id) as words, as_owner(connection):
        with connection.connection.cursor().copy(_COPY_JOBS) as copy:
            for count, entry in enumerate(entries, start=1):
                if count > JOBS_MAX:
                    raise TooManyJobs(JOBS_MAX)
                row, prompt = _row(to, entry, count - 1, ids[count - 1] if ids else uuid4())
                if row.line is None or row.line != last_line:
                    lines, last_line = lines + 1, row.line
                copy.write_row(row)
                words.add(row.id, row.position, prompt)
        with connection.connection.cursor().copy(prompt_words.COPY) as copy:
            for chunk in words.chunks():
                copy.write(chunk)
    return count, lines


def _row(to: Destination, entry: Submission | Entry, position: int, job_id: UUID) -> tuple[_Row, str]:
    """The job's row, and its prompt."""
    submission = entry.submission if isinstance(entry, Entry) else entry
    line, source = (entry.line, Json(entry.source)) if isinstance(entry, Entry) else (None, None)
    request = submission.request()
    request_json = request.model_dump_json()
    row = _Row(
        id=job_id,
        tenant=to.tenant,
        batch_id=to.batch_id,
        lane_id=to.lanes[submission.priority],
        position=position,
        line=line,
        source=source,
        name=submission.name,
        priority=submission.priority.rank,
        work=request.work,
        request=request_json,
        fingerprint=_fingerprint(request_json),
        max_failures=to.max_failures,
        previews=to.previews,
    )
    return row, request.prompt


INSERT_BATCH = text(
    """
    INSERT INTO batches (id, tenant, name, weight, file_id, metadata)
    VALUES (:id, :tenant, :name, :weight, :file, :metadata)
    """
)

REFUSE_BATCH = text(
    """
    INSERT INTO batches (id, tenant, name, weight, file_id, metadata, refused, finished_at)
    VALUES (:id, :tenant, :name, :weight, :file, :metadata, :refused, now())
    """
)

_INSERT_REJECTION = text(
    """
    INSERT INTO rejections (batch_id, line, tenant, source, code, message, field)
    VALUES (:batch, :line, :tenant, :source, :code, :message, :field)
    """
)

_MODELS_NOW = """
    SELECT model, revision FROM workers WHERE stopped_at IS NULL AND heartbeat_at > now() - interval '1 minute'
    UNION (SELECT model, revision FROM workers ORDER BY heartbeat_at DESC LIMIT 1)
"""
"""What the farm draws with: the models of the workers that live, and that of the one seen last."""

_DRAWN = text(
    f"""
    SELECT jobs.id FROM jobs JOIN workers ON workers.id = jobs.worker_id
    WHERE jobs.fingerprint = :fingerprint AND jobs.state = 'succeeded' AND jobs.tenant = :tenant
      AND (workers.model, workers.revision) IN ({_MODELS_NOW})
    LIMIT 1 FOR KEY SHARE OF jobs SKIP LOCKED
    """
)

SHARE_DRAWN = text(
    f"""
    UPDATE jobs SET state = 'succeeded', finished_at = now(), copy_of = drawn.id, worker_id = drawn.worker_id,
        object_key = drawn.object_key, sha256 = drawn.sha256, size_bytes = drawn.size_bytes,
        width_px = drawn.width_px, height_px = drawn.height_px, format = drawn.format, warnings = drawn.warnings
    FROM (
        SELECT DISTINCT ON (fingerprint) before.* FROM jobs AS before
        JOIN workers ON workers.id = before.worker_id
        WHERE before.state = 'succeeded' AND before.tenant = :tenant AND before.fingerprint IN (
                  SELECT fingerprint FROM jobs WHERE batch_id = :batch)
          AND (workers.model, workers.revision) IN ({_MODELS_NOW})
    ) AS drawn
    WHERE jobs.batch_id = :batch AND jobs.state = 'queued' AND jobs.fingerprint = drawn.fingerprint
    """
)

COMPLETE_BATCH = text("UPDATE batches SET jobs = :jobs, lines = :lines, rejected = :rejected WHERE id = :id")

# Until the end of the transaction. By a hash: that two keys share one costs the later of them a second question.
_LOCK_KEY = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:key, hashtextextended(:tenant, 0)))")
_KEEP_KEY = text(
    """
    INSERT INTO submissions (tenant, key, fingerprint, job_id, batch_id)
    VALUES (:tenant, :key, :fingerprint, :job_id, :batch_id) ON CONFLICT DO NOTHING
    """
)

_EARLIER = text("SELECT fingerprint, job_id, batch_id FROM submissions WHERE tenant = :tenant AND key = :key")

_OPEN_SINGLE_LANE = text(
    "SELECT id FROM lanes WHERE tenant = :tenant AND batch_id IS NULL AND priority = :priority AND open FOR SHARE"
)

_SINGLE_LANE = text(
    f"""
    INSERT INTO lanes (tenant, priority, open) VALUES (:tenant, :priority, true)
    ON CONFLICT (tenant, coalesce(batch_id, CAST('{UUID(int=0)}' AS uuid)), priority) DO UPDATE SET open = true
    RETURNING id
    """
)

_BATCH_LANE = text(
    "INSERT INTO lanes (tenant, batch_id, priority, open) VALUES (:tenant, :batch, :priority, true) RETURNING id"
)
