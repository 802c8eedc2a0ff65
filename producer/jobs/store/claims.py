"""What a worker does: heartbeats, claims, and how each claim ends."""

from typing import Any
from uuid import UUID

from sqlalchemy import text

from producer.jobs.contract import Claim, Fence, Message, Outcome, Priority, Recorded
from producer.jobs.errors import LostClaim
from producer.jobs.store.part import Part, notify


class Claims(Part):
    """Every write that concerns a claim is fenced: it changes the row, or raises ``LostClaim``."""

    def beat(self, worker_id: UUID, description: dict[str, Any], drawing: str, speed: float | None = None) -> None:
        """The worker's heartbeat: host, pid, device, model, revision, version, capacity, what it draws (JSON), and its
        ``speed`` in megapixel-steps a second."""
        with self._single() as connection:
            connection.execute(_BEAT, {"id": worker_id, "drawing": drawing, "speed": speed, **description})

    def farewell(self, worker_id: UUID) -> None:
        """The worker ends in order."""
        with self._single() as connection:
            connection.execute(text("UPDATE workers SET stopped_at = now() WHERE id = :id"), {"id": worker_id})

    def claim(self, message: Message, worker_id: UUID) -> Claim | None:
        """Take the job, if the message still holds; None otherwise: duplicates and stale messages cost nothing."""
        values = {"job": message.job_id, "claim": message.claim, "worker": worker_id}
        with self._single() as connection:
            row = connection.execute(_CLAIM, values).mappings().first()
        if row is None:
            return None
        facts = {**row, "priority": Priority.of_rank(row["priority"])}
        return Claim(job_id=message.job_id, claim=message.claim, worker_id=worker_id, **facts)

    def holding(self, worker_id: UUID) -> set[Message]:
        """The claims that are this worker's now; of others that it held, each was cancelled or reclaimed."""
        statement = text("SELECT id, claim FROM jobs WHERE state = 'running' AND worker_id = :worker")
        with self._single() as connection:
            return {Message(row.id, row.claim) for row in connection.execute(statement, {"worker": worker_id})}

    def urgent_messages_per_worker(self, priority: Priority, *, waiting_s: float, lease_s: float) -> float:
        """Messages that are more urgent than ``priority`` and that nobody has taken for ``waiting_s``, for each worker
        that lives."""
        values = {"rank": priority.rank, "waiting": waiting_s, "lease": lease_s}
        with self._single() as connection:
            row = connection.execute(_URGENT_MESSAGES, values).one()
        return float(row.messages / max(1, row.workers))

    def mark_alone(self, claim: Claim) -> None:
        """The suspect has the process to itself: a death from here on is its own. Raises: LostClaim."""
        self._note(claim, "drawn_alone = true")

    def note_checkpoint(self, fence: Fence, key: str, step: int) -> None:
        """From now on the job goes on after ``step`` steps, with what lies at ``key``. Raises: LostClaim."""
        self._note(fence, "checkpoint_key = :key, checkpoint_step = :step", key=key, step=step)

    def note_preview(self, fence: Fence, key: str) -> None:
        """From now on the job's unfinished image is shown by what lies at ``key``. Raises: LostClaim."""
        self._note(fence, "preview_key = :key", key=key)

    def _note(self, fence: Fence, change: str, **values: Any) -> None:
        statement = text(
            f"UPDATE jobs SET {change} WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker"
        )
        with self._single() as connection:
            noted = connection.execute(statement, _fence(fence) | values)
        if noted.rowcount != 1:
            raise LostClaim(fence.job_id, fence.claim)

    def record(self, claim: Claim, recorded: Recorded) -> None:
        """The job succeeded, with this image. Asking twice is recording once. Raises: LostClaim."""
        values = _fence(claim) | vars(recorded)
        with self._single() as connection:
            if connection.execute(_RECORD, values).scalar_one():
                return
            if connection.execute(_RECORDED_ALREADY, values).first() is None:
                raise LostClaim(claim.job_id, claim.claim)

    def fail(self, claim: Claim, code: str, message: str, *, trace: str | None = None) -> None:
        """The job failed for good. Raises: LostClaim."""
        self._settle(claim, Outcome.FAILED, code, message, trace=trace, charge=1, final=True)

    def retry(self, claim: Claim, code: str, message: str, *, delay_s: float, trace: str | None = None) -> None:
        """The claim failed; the job waits and is tried again, or fails if this was its last. Raises: LostClaim."""
        self._settle(claim, Outcome.RETRIED, code, message, trace=trace, charge=1, delay_s=delay_s)

    def give_back(self, fence: Fence) -> None:
        """The worker drains, or never learnt of its claim: the job goes back to its place in the queue, no failure
        charged. Raises: LostClaim."""
        self._settle(fence, Outcome.DRAINED, None, None, charge=0)

    def give_back_all(self, worker_id: UUID) -> int:
        """Give back whatever is still this worker's, which ends now; returns how many jobs that were."""
        with self._begin() as connection:
            given = connection.execute(_GIVE_BACK_ALL, {"worker": worker_id}).scalar_one()
            notify(connection)
        return int(given)

    def _settle(
        self,
        claim: Fence,
        outcome: Outcome,
        code: str | None,
        message: str | None,
        *,
        charge: int,
        delay_s: float = 0.0,
        trace: str | None = None,
        final: bool = False,
    ) -> None:
        values = _fence(claim) | {
            "outcome": outcome,
            "code": code,
            "message": _storable(message),
            "trace": _storable(trace or message),
            "charge": charge,
            "delay": delay_s,
            "final": final,
        }
        with self._begin() as connection:
            if not connection.execute(_SETTLE, values).scalar_one():
                raise LostClaim(claim.job_id, claim.claim)
            notify(connection)


def _storable(words: str | None) -> str | None:
    """Without what Postgres cannot keep in a text: an error's words must never keep its job from ending."""
    return (
        None if words is None else words.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
    )


def _fence(claim: Fence) -> dict[str, Any]:
    return {"job": claim.job_id, "claim": claim.claim, "worker": claim.worker_id}


_BEAT = text(
    """
    INSERT INTO workers (id, host, pid, device, model, revision, version, capacity, drawing, speed)
    VALUES (:id, :host, :pid, :device, :model, :revision, :version, :capacity, CAST(:drawing AS jsonb), :speed)
    ON CONFLICT (id) DO UPDATE SET heartbeat_at = now(), drawing = excluded.drawing, speed = excluded.speed
    """
)

_CLAIM = text(
    """
    WITH claimed AS (
        UPDATE jobs SET state = 'running', claim = :claim, worker_id = :worker, claimed_at = now(), drawn_alone = false,
                        waiting_s = extract(epoch FROM now() - greatest(created_at, not_before))
        WHERE id = :job AND state = 'queued' AND claim = :claim - 1 AND not_before <= now()
          AND NOT EXISTS (SELECT 1 FROM batches WHERE batches.id = jobs.batch_id AND paused)
        RETURNING batch_id, priority, suspect, failures, waiting_s, request, checkpoint_key, checkpoint_step,
                  previews
    ), noted AS (
        INSERT INTO claims (job_id, claim, worker_id) SELECT :job, :claim, :worker FROM claimed
    ), gone AS (
        DELETE FROM messages WHERE job_id = :job AND claim <= :claim
    )
    SELECT * FROM claimed
    """
)

_RECORD = text(
    """
    WITH recorded AS (
        UPDATE jobs SET state = 'succeeded', finished_at = now(), error_code = NULL, error_message = NULL,
               object_key = :object_key, sha256 = :sha256, size_bytes = :size_bytes, width_px = :width_px,
               height_px = :height_px, format = :format, drawing_s = :drawing_s, encoding_s = :encoding_s,
               uploading_s = :uploading_s, warnings = :warnings, checkpoint_key = NULL, checkpoint_step = 0,
               preview_key = NULL
        WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker
        RETURNING id
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'succeeded' FROM recorded
        WHERE job_id = :job AND claim = :claim
    )
    SELECT count(*) FROM recorded
    """
)

_RECORDED_ALREADY = text(
    """
    SELECT 1 FROM jobs
    WHERE id = :job AND state = 'succeeded' AND claim = :claim AND worker_id = :worker AND object_key = :object_key
    """
)

_SETTLE = text(
    """
    WITH settled AS (
        UPDATE jobs SET
            state = CASE WHEN :final OR (:charge > 0 AND failures + :charge >= max_failures)
                         THEN 'failed' ELSE 'queued' END,
            finished_at = CASE WHEN :final OR (:charge > 0 AND failures + :charge >= max_failures) THEN now() END,
            failures = failures + :charge, worker_id = NULL, drawn_alone = false, preview_key = NULL,
            not_before = CASE WHEN :charge > 0 THEN now() + make_interval(secs => :delay) ELSE not_before END,
            checkpoint_key = CASE WHEN :charge > 0 THEN NULL ELSE checkpoint_key END,
            checkpoint_step = CASE WHEN :charge > 0 THEN 0 ELSE checkpoint_step END,
            error_code = coalesce(:code, error_code), error_message = coalesce(:message, error_message)
        WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker
        RETURNING state, lane_id
    ), noted AS (
        UPDATE claims SET ended_at = now(), error = :trace,
               outcome = CASE WHEN settled.state = 'failed' THEN 'failed' ELSE :outcome END
        FROM settled WHERE job_id = :job AND claim = :claim
    ), opened AS (
        UPDATE lanes SET open = true FROM settled WHERE lanes.id = settled.lane_id AND settled.state = 'queued'
    )
    SELECT count(*) FROM settled
    """
)

_GIVE_BACK_ALL = text(
    """
    WITH given AS (
        UPDATE jobs SET state = 'queued', worker_id = NULL, drawn_alone = false, preview_key = NULL
        WHERE state = 'running' AND worker_id = :worker
        RETURNING id, claim, lane_id
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'drained' FROM given
        WHERE claims.job_id = given.id AND claims.claim = given.claim
    ), opened AS (
        UPDATE lanes SET open = true FROM given WHERE lanes.id = given.lane_id
    )
    SELECT count(*) FROM given
    """
)

_URGENT_MESSAGES = text(
    """
    SELECT (SELECT count(*) FROM messages WHERE published_at < now() - make_interval(secs => :waiting)
            AND (SELECT priority FROM jobs WHERE jobs.id = job_id) < :rank) AS messages,
           (SELECT count(*) FROM workers
            WHERE stopped_at IS NULL AND heartbeat_at > now() - make_interval(secs => :lease)) AS workers
    """
)
