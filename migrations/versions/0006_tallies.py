"""Counts that need no counting: triggers note how many jobs of a batch, and of a tenant, came into each state.

Revision: 0006, after 0005. ``batches.counts`` goes, which said the same of finished batches; ``batches.lines`` comes.
Jobs cannot be written while those that are there are counted: some 30 s with ten million.
"""

from uuid import UUID

import sqlalchemy as sa
from alembic import op
from sqlalchemy import text
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ALL = f"CAST('{UUID(int=0)}' AS uuid)"

# Only rows are added, so nobody who changes a job waits for somebody else who does; the leader adds them up now and
# then. As the tables' owner, since a tenant who cancels may not write a count by hand.
TALLY_JOBS = """
    CREATE FUNCTION tally_jobs() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = {schema}, pg_temp AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO tallies (tenant, batch_id, priority, state, jobs, pixel_steps)
            SELECT tenant, batch_id, priority, state, count(*), sum(round(work * 1e6))
            FROM after GROUP BY {levels};
        ELSIF TG_OP = 'DELETE' THEN
            INSERT INTO tallies (tenant, batch_id, priority, state, jobs, pixel_steps)
            SELECT tenant, batch_id, priority, state, -count(*), -sum(round(work * 1e6))
            FROM before GROUP BY {levels};
        ELSE
            INSERT INTO tallies (tenant, batch_id, priority, state, jobs, pixel_steps)
            SELECT tenant, batch_id, priority, state, sum(change), sum(change * round(work * 1e6))
            FROM (SELECT tenant, batch_id, priority, state, work, -1 AS change FROM before
                  UNION ALL SELECT tenant, batch_id, priority, state, work, 1 FROM after) AS changes
            GROUP BY {levels} AND sum(change) <> 0;
        END IF;
        RETURN NULL;
    END $$
"""
# Of each batch, and of all that a tenant has, in batches or alone.
LEVELS = """
    GROUPING SETS ((tenant, batch_id, priority, state), (tenant, priority, state))
    HAVING (GROUPING(batch_id) = 1 OR batch_id IS NOT NULL)
"""
TRIGGERS = (
    """
    CREATE TRIGGER jobs_come AFTER INSERT ON jobs REFERENCING NEW TABLE AS after
    FOR EACH STATEMENT EXECUTE FUNCTION tally_jobs()
    """,
    """
    CREATE TRIGGER jobs_change AFTER UPDATE ON jobs REFERENCING OLD TABLE AS before NEW TABLE AS after
    FOR EACH STATEMENT EXECUTE FUNCTION tally_jobs()
    """,
    """
    CREATE TRIGGER jobs_go AFTER DELETE ON jobs REFERENCING OLD TABLE AS before
    FOR EACH STATEMENT EXECUTE FUNCTION tally_jobs()
    """,
)
# An open lane holds jobs of one priority, and its index (state, lane, time from which it is due) has the first that
# waits, and those that are delayed.
OPS_BACKLOG = """
    CREATE VIEW ops_backlog AS
    WITH tallied AS (
        SELECT priority, coalesce(sum(jobs) FILTER (WHERE state = 'queued'), 0) AS queued,
               coalesce(sum(jobs) FILTER (WHERE state = 'running'), 0) AS running
        FROM tallies WHERE batch_id IS NULL GROUP BY priority
    ), due AS (
        SELECT priority, sum(delayed) AS delayed, min(oldest) AS oldest FROM lanes
        CROSS JOIN LATERAL (SELECT count(*) AS delayed FROM jobs
                            WHERE state = 'queued' AND lane_id = lanes.id AND not_before > now()) AS delayed
        CROSS JOIN LATERAL (SELECT min(created_at) AS oldest FROM (
            SELECT created_at FROM jobs WHERE state = 'queued' AND lane_id = lanes.id
            ORDER BY not_before, seq LIMIT 1) AS first) AS oldest
        WHERE open GROUP BY priority
    )
    SELECT (ARRAY['interactive', 'standard', 'bulk'])[priority + 1] AS priority,
           (queued - coalesce(delayed, 0))::bigint AS waiting, coalesce(delayed, 0)::bigint AS delayed,
           running::bigint AS running, extract(epoch FROM now() - oldest)::float AS oldest_waiting_s
    FROM tallied LEFT JOIN due USING (priority) WHERE queued > 0 OR running > 0
"""
OPS_BACKLOG_COUNTED = """
    CREATE VIEW ops_backlog AS
    SELECT (ARRAY['interactive', 'standard', 'bulk'])[priority + 1] AS priority,
           count(*) FILTER (WHERE state = 'queued' AND not_before <= now()) AS waiting,
           count(*) FILTER (WHERE state = 'queued' AND not_before > now()) AS delayed,
           count(*) FILTER (WHERE state = 'running') AS running,
           extract(epoch FROM now() - min(created_at) FILTER (WHERE state = 'queued'))::float AS oldest_waiting_s
    FROM jobs WHERE state IN ('queued', 'running') GROUP BY priority
"""
TALLY_ALL = """
    INSERT INTO tallies (tenant, batch_id, priority, state, jobs, pixel_steps, at, folded)
    SELECT tenant, batch_id, priority, state, count(*), sum(round(work * 1e6)), coalesce(max(finished_at), now()), true
    FROM jobs GROUP BY {levels}
"""
COUNT_LINES = """
    UPDATE batches SET lines = found.lines
    FROM (SELECT batch_id, count(DISTINCT coalesce(line, position + 1)) AS lines
          FROM jobs WHERE batch_id IS NOT NULL GROUP BY batch_id) AS found
    WHERE found.batch_id = batches.id
"""
NOTE_BATCH = """
    CREATE OR REPLACE FUNCTION note_batch() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = {schema}, pg_temp AS $$
    BEGIN
        WITH noted AS (
            INSERT INTO events (tenant, batch_id, kind, data)
            SELECT NEW.tenant, NEW.id, 'batch.finished', jsonb_build_object(
                'name', NEW.name, 'jobs', NEW.jobs, 'rejected', NEW.rejected, 'counts',
                '{{"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}}' || {counts})
            RETURNING *
        ), told AS (
            SELECT id, tenant, kinds FROM webhooks
            WHERE tenant IN (SELECT tenant FROM noted) AND kinds && ARRAY(SELECT DISTINCT kind FROM noted)
              AND disabled_at IS NULL
            FOR KEY SHARE SKIP LOCKED
        )
        INSERT INTO deliveries (id, webhook_id, tenant, kind, data, created_at, next_at)
        SELECT gen_random_uuid(), told.id, noted.tenant, noted.kind,
               noted.data || jsonb_build_object('batch_id', noted.batch_id), noted.at, now()
        FROM noted JOIN told ON told.tenant = noted.tenant AND noted.kind = ANY(told.kinds);
        RETURN NULL;
    END $$
"""
TALLIED = """
    coalesce((SELECT jsonb_object_agg(state, n) FROM (
        SELECT state, sum(jobs) AS n FROM tallies WHERE batch_id = NEW.id GROUP BY state) AS states), '{}')
"""
COUNTED = "coalesce(NEW.counts, '{}')"
COUNT_FINISHED = """
    UPDATE batches SET counts = coalesce((SELECT jsonb_object_agg(state, n) FROM (
        SELECT state, sum(jobs) AS n FROM tallies WHERE batch_id = batches.id GROUP BY state) AS states), '{}')
    WHERE finished_at IS NOT NULL
"""


def upgrade() -> None:
    op.create_table(
        "tallies",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Never changes."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose jobs; never changes."),
        sa.Column(
            "batch_id",
            sa.Uuid(),
            nullable=True,
            comment="NULL: all of the tenant's, in batches or alone; never changes.",
        ),
        sa.Column("priority", sa.SmallInteger(), nullable=False, comment="Rank of contract.Priority; never changes."),
        sa.Column("state", sa.Text(), nullable=False, comment="contract.State; never changes."),
        sa.Column("jobs", sa.Integer(), nullable=False, comment="That came into the state, less those that left it."),
        sa.Column(
            "pixel_steps",
            sa.BigInteger(),
            nullable=False,
            comment="Their work; a million is a megapixel-step: whole numbers, so that no sum is rounded.",
        ),
        sa.Column(
            "at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the last of them did.",
        ),
        sa.Column(
            "folded",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="The one row to which the leader adds the others, so that there are few; never changes.",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("tallies_pkey")),
        comment="Jobs by state: how many are in it is the sum of the rows. Triggers write them, the leader adds up.",
    )
    op.create_index("tallies_batch", "tallies", ["batch_id"], unique=False)
    op.create_index("tallies_tenant", "tallies", ["tenant"], unique=False, postgresql_where=sa.text("batch_id IS NULL"))
    op.create_index(
        "tallies_folded",
        "tallies",
        ["tenant", sa.text(f"coalesce(batch_id, {ALL})"), "priority", "state"],
        unique=True,
        postgresql_where=sa.text("folded"),
    )
    op.create_index("tallies_new", "tallies", ["id"], unique=False, postgresql_where=sa.text("NOT folded"))
    op.create_index("tallies_empty", "tallies", ["id"], unique=False, postgresql_where=sa.text("folded AND jobs = 0"))
    op.execute("ALTER TABLE tallies ENABLE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY own ON tallies TO ovis_tenant USING (tenant = current_setting('ovis.tenant', true))")
    op.execute("GRANT SELECT ON tallies TO ovis_tenant")
    op.add_column(
        "batches",
        sa.Column(
            "lines",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Of the input that became jobs; set in the submitting transaction; never changes.",
        ),
    )
    _create(TALLY_JOBS, levels=LEVELS)
    _create(NOTE_BATCH, counts=TALLIED)
    for trigger in TRIGGERS:
        op.execute(trigger)
    op.execute("DROP VIEW ops_backlog")
    op.execute(OPS_BACKLOG)
    op.execute(TALLY_ALL.format(levels=LEVELS))
    op.execute(COUNT_LINES)
    op.drop_column("batches", "counts")


def downgrade() -> None:
    op.add_column(
        "batches",
        sa.Column(
            "counts",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="Its jobs by state, once it is finished; set and cleared with finished_at.",
        ),
    )
    op.execute(COUNT_FINISHED)
    _create(NOTE_BATCH, counts=COUNTED)
    for trigger in ("jobs_come", "jobs_change", "jobs_go"):
        op.execute(f"DROP TRIGGER {trigger} ON jobs")
    op.execute("DROP FUNCTION tally_jobs()")
    op.execute("DROP VIEW ops_backlog")
    op.execute(OPS_BACKLOG_COUNTED)
    op.drop_column("batches", "lines")
    op.drop_table("tallies")


def _create(function: str, **parts: str) -> None:
    schema = op.get_bind().scalar(text("SELECT quote_ident(current_schema())"))
    op.execute(function.format(schema=schema, **parts))
