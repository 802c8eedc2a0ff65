"""Triggers that write events, and their deliveries to webhooks, in the transaction that changes a job or a batch.

Revision: 0005, after 0004. A submission is no change, so nothing of this runs while rows are copied in.

The functions run as the tables' owner: whoever cancels through a tenant's key may write no event by hand. A webhook
that is being deleted is passed over: to wait for it would be to lose an image because of it.
"""

from alembic import op
from sqlalchemy import text

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# One statement for all rows that a statement changed. Without nested loops, since the plan is made when a session first
# changes one job, and would compare each row with each other when it then cancels twenty thousand.
NOTE_JOBS = """
    CREATE FUNCTION note_jobs() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = {schema}, pg_temp SET enable_nestloop = off AS $$
    BEGIN
        WITH noted AS (
            INSERT INTO events (tenant, batch_id, job_id, kind, data)
            SELECT after.tenant, after.batch_id, after.id, 'job.' || after.state,
                   jsonb_strip_nulls(jsonb_build_object(
                       'state', after.state, 'name', after.name,
                       'error_code', CASE WHEN after.state IN ('failed', 'queued') THEN after.error_code END))
            FROM after JOIN before ON before.id = after.id WHERE before.state <> after.state
            RETURNING *
        ), told AS (
            SELECT id, tenant, kinds FROM webhooks
            WHERE tenant IN (SELECT tenant FROM noted) AND kinds && ARRAY(SELECT DISTINCT kind FROM noted)
              AND disabled_at IS NULL
            FOR KEY SHARE SKIP LOCKED
        )
        INSERT INTO deliveries (id, webhook_id, tenant, kind, data, created_at, next_at)
        SELECT gen_random_uuid(), told.id, noted.tenant, noted.kind,
               noted.data || jsonb_build_object('job_id', noted.job_id, 'batch_id', noted.batch_id), noted.at, now()
        FROM noted JOIN told ON told.tenant = noted.tenant AND noted.kind = ANY(told.kinds);
        RETURN NULL;
    END $$
"""

NOTE_BATCH = """
    CREATE FUNCTION note_batch() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = {schema}, pg_temp AS $$
    BEGIN
        WITH noted AS (
            INSERT INTO events (tenant, batch_id, kind, data)
            SELECT NEW.tenant, NEW.id, 'batch.finished', jsonb_build_object(
                'name', NEW.name, 'jobs', NEW.jobs, 'rejected', NEW.rejected, 'counts',
                '{{"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}}'
                    || coalesce(NEW.counts, '{{}}'))
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

TRIGGERS = (
    """
    CREATE TRIGGER jobs_noted AFTER UPDATE ON jobs REFERENCING OLD TABLE AS before NEW TABLE AS after
    FOR EACH STATEMENT EXECUTE FUNCTION note_jobs()
    """,
    """
    CREATE TRIGGER batches_finished AFTER UPDATE OF finished_at ON batches FOR EACH ROW
    WHEN (OLD.finished_at IS NULL AND NEW.finished_at IS NOT NULL) EXECUTE FUNCTION note_batch()
    """,
    """
    CREATE TRIGGER batches_refused AFTER INSERT ON batches FOR EACH ROW
    WHEN (NEW.finished_at IS NOT NULL) EXECUTE FUNCTION note_batch()
    """,
)


def upgrade() -> None:
    schema = op.get_bind().scalar(text("SELECT quote_ident(current_schema())"))
    for function in (NOTE_JOBS, NOTE_BATCH):
        op.execute(function.format(schema=schema))
    for trigger in TRIGGERS:
        op.execute(trigger)


def downgrade() -> None:
    op.execute("DROP TRIGGER batches_refused ON batches")
    op.execute("DROP TRIGGER batches_finished ON batches")
    op.execute("DROP TRIGGER jobs_noted ON jobs")
    op.execute("DROP FUNCTION note_batch()")
    op.execute("DROP FUNCTION note_jobs()")
