"""How many jobs are in each state, without counting them: of a batch, a tenant, the farm.

Triggers on ``jobs`` (``migrations/versions/0006_tallies.py``) add rows to ``tallies`` in the transaction that changes a
job, whoever does: one for each batch, priority and state whose number changes, and one for the tenant as a whole. The
sum of the rows is what a count would find, and takes as long for a million jobs as for ten. Nobody waits for another's
row, as with one counter for all; the leader adds them up now and then (``fold``), so that there are few.
"""

from sqlalchemy import text

from producer.jobs.postgres import Database

BATCH_COUNTS = """
    (SELECT coalesce(jsonb_object_agg(state, n), '{}')
     FROM (SELECT state, sum(jobs) AS n FROM tallies WHERE batch_id = b.id GROUP BY state) AS s)
"""
"""SQL: the jobs of batch ``b`` by state, as JSON."""

FARM_COUNTS = """
    (SELECT coalesce(jsonb_object_agg(state, n), '{}')
     FROM (SELECT state, sum(jobs) AS n FROM tallies WHERE batch_id IS NULL GROUP BY state) AS s)
"""
"""SQL: all jobs by state, as JSON; for a tenant, its own."""

BATCH_OPEN = """
    coalesce((SELECT sum(jobs) > 0 FROM tallies WHERE batch_id = b.id AND state IN ('queued', 'running')), false)
"""
"""SQL: whether a job of batch ``b`` is queued or running."""


def fold(database: Database, since: int = 0) -> int:
    """Put one row in the place of all of a batch, priority and state, where any came behind the row ``since``; returns
    the last one, for the next time. Raises: Unavailable.

    Nothing changes for who reads, and two at once harm nothing: each adds up what it has itself deleted.
    """
    with database.single() as connection:
        return int(connection.execute(FOLD, {"since": since}).scalar_one())


# Work is a sum of floats, of which some nothing may be left.
FOLD = text(
    """
    WITH gone AS (
        DELETE FROM tallies WHERE id IN (
            SELECT unnest(array_agg(id)) FROM tallies
            WHERE batch_id IN (SELECT batch_id FROM tallies WHERE id > :since)
            GROUP BY batch_id, priority, state HAVING count(*) > 1
            UNION ALL
            SELECT unnest(array_agg(id)) FROM tallies WHERE batch_id IS NULL
            GROUP BY tenant, priority, state HAVING count(*) > 1)
        RETURNING tenant, batch_id, priority, state, jobs, work, at
    ), kept AS (
        INSERT INTO tallies (tenant, batch_id, priority, state, jobs, work, at)
        SELECT tenant, batch_id, priority, state, sum(jobs), sum(work), max(at) FROM gone
        GROUP BY tenant, batch_id, priority, state HAVING sum(jobs) <> 0 OR abs(sum(work)) > 1e-6
    )
    SELECT coalesce(max(id), :since) FROM tallies
    """
)
