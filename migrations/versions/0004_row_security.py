"""Tenants see their own rows: a role that owns nothing, and a policy on every table that holds rows of tenants.

Revision: 0004, after 0003. The role is the whole server's: another database may need it, so the way back leaves it.
What a database user may do who is no administrator: let one run CREATE ROLE ovis_tenant NOLOGIN and
GRANT ovis_tenant TO that user, once a server; then this migration finds the role.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

OWN = "tenant = current_setting('ovis.tenant', true)"
OF_OWN_JOB = "EXISTS (SELECT FROM jobs WHERE jobs.id = job_id)"  # through the policy of jobs
OWNED = {
    "answers": OWN,
    "batches": OWN,
    "claims": OF_OWN_JOB,
    "deletions": OWN,
    "deliveries": OWN,
    "events": OWN,
    "files": OWN,
    "jobs": OWN,
    "lanes": OWN,
    "messages": OF_OWN_JOB,
    "rejections": OWN,
    "submissions": OWN,
    "submitted": OWN,
    "webhooks": OWN,
}
"""The tables that hold rows of tenants, and which of them are a tenant's own."""
TOLD = ("events", "submitted")
"""Of these, what a tenant reads and the farm alone writes."""
CLOSED = ("api_keys", "prompt_words")
"""Row security without a policy: a tenant sees none of their rows, even if somebody once granted them."""


def upgrade() -> None:
    op.create_table(
        "submitted",
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose jobs they were; never changes."),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False, comment="Its beginning; never changes."),
        sa.Column("jobs", sa.BigInteger(), nullable=False, comment="Raised by each submission in that hour."),
        sa.PrimaryKeyConstraint("tenant", "hour", name=op.f("submitted_pkey")),
        comment="Jobs submitted by tenants that have a limit a day, deleted ones too; kept for a day.",
    )
    op.execute(MAKE_ROLE)
    for table, own in OWNED.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own ON {table} TO ovis_tenant USING ({own}) WITH CHECK ({own})")
        op.execute(f"GRANT {'SELECT' if table in TOLD else 'SELECT, INSERT, UPDATE, DELETE'} ON {table} TO ovis_tenant")
    op.execute("ALTER TABLE tenants ENABLE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY own ON tenants TO ovis_tenant USING (name = current_setting('ovis.tenant', true))")
    op.execute("GRANT SELECT ON tenants, workers TO ovis_tenant")
    # Without a policy: nothing of these is a tenant's to see, even if somebody once granted the table.
    op.execute("ALTER TABLE api_keys ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE prompt_words ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    op.execute("ALTER TABLE prompt_words DISABLE ROW LEVEL SECURITY")
    for table in CLOSED:
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    op.execute("REVOKE SELECT ON workers FROM ovis_tenant")
    for table in ("tenants", *OWNED):
        op.execute(f"REVOKE ALL ON {table} FROM ovis_tenant")
        op.execute(f"DROP POLICY own ON {table}")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    op.execute("DO $$ BEGIN EXECUTE format('REVOKE USAGE ON SCHEMA %I FROM ovis_tenant', current_schema()); END $$")
    op.drop_table("submitted")


# Another database of this server may be migrated at the same moment: then the role is there when ours has waited.
# Since 16 whoever makes a role may not take it on by that alone.
MAKE_ROLE = """
    DO $$
    BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'ovis_tenant') THEN
            BEGIN
                CREATE ROLE ovis_tenant NOLOGIN;
            EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
            END;
        END IF;
        IF NOT pg_has_role('ovis_tenant', CASE WHEN current_setting('server_version_num')::int >= 160000
                                               THEN 'SET' ELSE 'MEMBER' END) THEN
            EXECUTE format('GRANT ovis_tenant TO %I', current_user);
        END IF;
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO ovis_tenant', current_schema());
    END
    $$
"""
