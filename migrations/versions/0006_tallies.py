"""Counts that need no counting: triggers note how many jobs of a batch came into each state, and left it.

Revision: 0006, after 0005. ``batches.counts`` goes, which said the same of finished batches; ``batches.lines`` comes.
Jobs cannot be written while those that are there are counted: some seconds with ten million.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import text
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Only rows are added, so nobody who changes a job waits for somebody else who does; the leader adds them up now and
# then. As the tables' owner, since a tenant who cancels may not write a count by hand.
TALLY_JOBS = """
    CREATE FUNCTION tally_jobs() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = {schema}, pg_temp AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO tallies (tenant, batch_id, state, jobs, work)
            SELECT tenant, batch_id, state, count(*), sum(work) FROM after GROUP BY tenant, batch_id, state;
        ELSIF TG_OP = 'DELETE' THEN
            INSERT INTO tallies (tenant, batch_id, state, jobs, work)
            SELECT tenant, batch_id, state, -count(*), -sum(work) FROM before GROUP BY tenant, batch_id, state;
        ELSE
            INSERT INTO tallies (tenant, batch_id, state, jobs, work)
            SELECT tenant, batch_id, state, sum(change), sum(change * work)
            FROM (SELECT tenant, batch_id, state, work, -1 AS change FROM before
                  UNION ALL SELECT tenant, batch_id, state, work, 1 FROM after) AS changes
            GROUP BY tenant, batch_id, state HAVING sum(change) <> 0;
        END IF;
        RETURN NULL;
    END $$
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
TALLY_ALL = """
    INSERT INTO tallies (tenant, batch_id, state, jobs, work, at)
    SELECT tenant, batch_id, state, count(*), sum(work), coalesce(max(finished_at), now())
    FROM jobs GROUP BY tenant, batch_id, state
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
        sa.Column("batch_id", sa.Uuid(), nullable=True, comment="NULL: those submitted alone; never changes."),
        sa.Column("state", sa.Text(), nullable=False, comment="contract.State; never changes."),
        sa.Column(
            "jobs",
            sa.Integer(),
            nullable=False,
            comment="That came into the state, less those that left it; never changes.",
        ),
        sa.Column("work", sa.Double(), nullable=False, comment="Of these jobs, in megapixel-steps; never changes."),
        sa.Column(
            "at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the last of them did; never changes.",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("tallies_pkey")),
        comment="Jobs by state: how many are in it is the sum of the rows. Triggers write them, the leader adds up.",
    )
    op.create_index("tallies_batch", "tallies", ["batch_id"], unique=False)
    op.create_index("tallies_tenant", "tallies", ["tenant"], unique=False)
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
    _create(TALLY_JOBS)
    _create(NOTE_BATCH, counts=TALLIED)
    for trigger in TRIGGERS:
        op.execute(trigger)
    op.execute(TALLY_ALL)
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
    op.drop_column("batches", "lines")
    op.drop_table("tallies")


def _create(function: str, **parts: str) -> None:
    schema = op.get_bind().scalar(text("SELECT quote_ident(current_schema())"))
    op.execute(function.format(schema=schema, **parts))
