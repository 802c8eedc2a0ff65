"""What a person changes afterwards: cancel, retry, pause, prioritise, delete; weights and limits of tenants."""

from collections.abc import Iterable, Mapping
from uuid import UUID

from sqlalchemy import Connection, text

from producer.jobs.contract import RETRIED, Batch, Job, Priority, State, Tenant
from producer.jobs.errors import IllegalTransition, NotFound
from producer.jobs.store.part import notify
from producer.jobs.store.reading import TENANT_COLUMNS, Reading


class Changes(Reading):
    """Each is one transaction, and answers with what is there after it."""

    def set_tenant(self, name: str, changes: Mapping[str, float | None]) -> Tenant:
        """Change what is named of the tenant's weight and limits (fields of ``Tenant``); None takes a limit away."""
        changed = ", ".join(f"{field} = :{field}" for field in Tenant.model_fields if field in changes)
        statement = f"UPDATE tenants SET {changed or 'name = name'} WHERE name = :name RETURNING {TENANT_COLUMNS}"
        with self._begin() as connection:
            connection.execute(_MAKE_TENANT, {"name": name})
            return Tenant(**connection.execute(text(statement), {**changes, "name": name}).mappings().one())

    def cancel(self, job_id: UUID) -> Job:
        """Cancel a queued or running job. Cancelling it twice is one cancel. Raises: NotFound, IllegalTransition."""
        with self._single() as connection:
            connection.execute(_CANCEL, {"job": job_id, "batch": None})
        job = self.job(job_id)
        if job.state is not State.CANCELLED:
            raise IllegalTransition(job_id, job.state, State.CANCELLED)
        return job

    def cancel_batch(self, batch_id: UUID) -> Batch:
        """Cancel all of a batch that has not ended; what has, stays. Raises: NotFound."""
        with self._begin() as connection:
            _lock_batch(connection, batch_id)
            connection.execute(_CANCEL, {"job": None, "batch": batch_id})
            connection.execute(_NOTE_CANCEL, {"batch": batch_id})
        return self.batch(batch_id)

    def retry_job(self, job_id: UUID) -> Job:
        """Send a failed or cancelled job back to the queue, its failures forgiven. Raises: NotFound,
        IllegalTransition: it has succeeded."""
        with self._begin() as connection:
            connection.execute(_LOCK_BATCH_OF, {"job": job_id})
            connection.execute(_RETRY, {"job": job_id, "batch": None, "states": list(RETRIED)})
            notify(connection)
        job = self.job(job_id)
        if job.state is State.SUCCEEDED:
            raise IllegalTransition(job_id, job.state, State.QUEUED)
        return job

    def retry_batch(self, batch_id: UUID, states: Iterable[State] = (State.FAILED,)) -> Batch:
        """Send those of the batch's jobs that ended so back to the queue. ``states`` are of ``contract.RETRIED``.
        Raises: NotFound."""
        wanted = sorted(RETRIED & set(states))
        with self._begin() as connection:
            _lock_batch(connection, batch_id)
            connection.execute(_RETRY, {"job": None, "batch": batch_id, "states": wanted})
            notify(connection)
        return self.batch(batch_id)

    def pause_batch(self, batch_id: UUID, *, paused: bool) -> Batch:
        """Claim nothing more of the batch, or claim again; what is being drawn is drawn. One that has finished stays as
        it is. Raises: NotFound."""
        statement = text("UPDATE batches SET paused = :paused WHERE id = :id AND finished_at IS NULL")
        with self._begin() as connection:
            connection.execute(statement, {"id": batch_id, "paused": paused})
            notify(connection)
        return self.batch(batch_id)

    def prioritise_batch(self, batch_id: UUID, priority: Priority) -> Batch:
        """Give all of the batch that has not ended another priority. Raises: NotFound."""
        with self._begin() as connection:
            _lock_batch(connection, batch_id)
            connection.execute(_PRIORITISE, {"batch": batch_id, "priority": priority.rank})
            notify(connection)
        return self.batch(batch_id)

    def delete_batch(self, batch_id: UUID) -> None:
        """Delete the batch with its jobs and history; its images go with the next sweep. Raises: NotFound."""
        with self._begin() as connection:
            _lock_batch(connection, batch_id)
            connection.execute(_DELETE_BATCH, {"batch": batch_id})


def _lock_batch(connection: Connection, batch_id: UUID) -> None:
    """Before anything is done to all of a batch, however long it takes: two steps at once would else wait for each
    other's rows for ever. Raises: NotFound."""
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    if connection.execute(_LOCK_BATCH, {"batch": batch_id}).first() is None:
        raise NotFound("batch", batch_id)


_MAKE_TENANT = text("INSERT INTO tenants (name, weight) VALUES (:name, 1) ON CONFLICT DO NOTHING")

_LOCK_BATCH = text("SELECT id FROM batches WHERE id = :batch FOR NO KEY UPDATE")
_LOCK_BATCH_OF = text("SELECT id FROM batches WHERE id = (SELECT batch_id FROM jobs WHERE id = :job) FOR NO KEY UPDATE")

_CANCEL = text(
    """
    WITH cancelled AS (
        UPDATE jobs SET state = 'cancelled', finished_at = now(), worker_id = NULL,
                        checkpoint_key = NULL, checkpoint_step = 0, preview_key = NULL
        WHERE (id = :job OR batch_id = :batch) AND state IN ('queued', 'running')
        RETURNING id, claim
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'cancelled' FROM cancelled
        WHERE claims.job_id = cancelled.id AND claims.claim = cancelled.claim AND ended_at IS NULL
    )
    DELETE FROM messages USING cancelled WHERE messages.job_id = cancelled.id
    """
)

_NOTE_CANCEL = text(
    "UPDATE batches SET cancelled_at = now() WHERE id = :batch AND cancelled_at IS NULL AND finished_at IS NULL"
)

_RETRY = text(
    """
    WITH again AS (
        UPDATE jobs SET state = 'queued', failures = 0, suspect = false, drawn_alone = false, not_before = now(),
                        finished_at = NULL, error_code = NULL, error_message = NULL
        WHERE (id = :job OR batch_id = :batch) AND state = ANY(:states)
        RETURNING lane_id, batch_id
    ), unfinished AS (
        UPDATE batches SET finished_at = NULL, cancelled_at = NULL
        WHERE id IN (SELECT batch_id FROM again)
    )
    UPDATE lanes SET open = true WHERE id IN (SELECT lane_id FROM again)
    """
)

_PRIORITISE = text(
    f"""
    WITH lane AS (
        INSERT INTO lanes (tenant, batch_id, priority, open)
        SELECT tenant, id, CAST(:priority AS smallint), true FROM batches WHERE id = :batch
        ON CONFLICT (tenant, coalesce(batch_id, CAST('{UUID(int=0)}' AS uuid)), priority) DO UPDATE SET open = true
        RETURNING id
    ), moved AS (
        UPDATE jobs SET priority = :priority, lane_id = lane.id FROM lane
        WHERE batch_id = :batch AND state IN ('queued', 'running') AND lane_id <> lane.id
        RETURNING jobs.id
    )
    DELETE FROM messages USING moved WHERE messages.job_id = moved.id
    """
)

_DELETE_BATCH = text(
    """
    WITH gone AS (
        SELECT id, copy_of, object_key, previews, claim > 1 OR claim > 0 AND state <> 'succeeded' AS unfinished
        FROM jobs WHERE batch_id = :batch
    ), noted AS (
        INSERT INTO deletions (tenant, prefixes)
        SELECT tenant, 'images/' || id || '/'
            || ARRAY(SELECT 'checkpoints/' || id || '/' FROM gone WHERE unfinished)
            || ARRAY(SELECT 'previews/' || id || '/' FROM gone WHERE previews > 0)
            || ARRAY(SELECT DISTINCT object_key FROM gone
                     WHERE copy_of IS NOT NULL AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.id = gone.copy_of))
        FROM batches WHERE id = :batch
    )
    DELETE FROM batches WHERE id = :batch
    """
)
"""Of a shared image whose first job went before, the last job that shares it takes it along. A job that succeeded may
have left checkpoints of claims that it lost."""
