"""How many jobs are in each state, without counting them: of a batch, a tenant, the farm.

Triggers on ``jobs`` (``migrations/versions/0006_tallies.py``) add rows to ``tallies`` in the transaction that changes a
job, whoever does: one for each batch, priority and state whose number changes, and one for the tenant as a whole. The
sum of the rows is what a count would find, and takes as long for a million jobs as for ten. Nobody waits for another's
row, as with one counter for all; the leader adds them up now and then (``Store.fold_tallies``), so that there are few.
"""

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
