"""Tenants, lanes for a fair order, idempotency keys, and where an unfinished image lies.

Revision: 0002, after 0001. Jobs that wait meanwhile keep their place, in lanes of the tenant ``default``.
"""

from uuid import UUID

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NO_BATCH = f"CAST('{UUID(int=0)}' AS uuid)"

FILL_LANES = (
    "INSERT INTO lanes (tenant, batch_id, priority, open) SELECT DISTINCT tenant, batch_id, priority, true FROM jobs"
)

# Work as pipeline.request.ImageRequest.work counts it: drawn pixels times steps times branches, in millions. Both in
# one statement, since each writes every row anew.
FILL_JOBS = f"""
    UPDATE jobs SET lane_id = lanes.id,
        work = ceil((request->>'width')::float / 16) * ceil((request->>'height')::float / 16) * 256
            * (request->>'steps')::float * CASE WHEN (request->>'guidance')::float > 1 THEN 2 ELSE 1 END / 1e6
    FROM lanes
    WHERE lanes.priority = jobs.priority AND coalesce(lanes.batch_id, {NO_BATCH}) = coalesce(jobs.batch_id, {NO_BATCH})
"""


def upgrade() -> None:
    for table, comment in (
        ("batches", "Whose batch it is; never changes."),
        ("jobs", "Whose job it is; never changes."),
    ):
        op.add_column(table, sa.Column("tenant", sa.Text(), nullable=False, server_default="default", comment=comment))
        op.alter_column(table, "tenant", server_default=None)
    op.add_column(
        "batches",
        sa.Column(
            "weight",
            sa.Double(),
            nullable=False,
            server_default=sa.text("1"),
            comment="Of its share beside the tenant's other batches; given at submission.",
        ),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.Text(), nullable=False, comment="Never changes."),
        sa.Column(
            "weight", sa.Double(), nullable=False, comment="Of its share beside other tenants; changed by a person."
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("tenants_pkey")),
        comment="Tenants whose weight is not 1: others need no row.",
    )
    _create_lanes()
    _give_jobs_their_lanes()
    _create_submissions()


def _create_lanes() -> None:
    op.create_table(
        "lanes",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Never changes."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Never changes."),
        sa.Column(
            "batch_id",
            sa.Uuid(),
            nullable=True,
            comment="NULL: the tenant's jobs that were submitted alone; never changes.",
        ),
        sa.Column("priority", sa.SmallInteger(), nullable=False, comment="Rank of contract.Priority; never changes."),
        sa.Column(
            "open",
            sa.Boolean(),
            nullable=False,
            comment="Set in each transaction that queues a job of the lane; taken back by the leader, who finds none.",
        ),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("lanes_batch_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("lanes_pkey")),
        comment="The jobs of one tenant, one batch (or none) and one priority: what the fair order chooses between.",
    )
    op.create_index("lanes_of_batch", "lanes", ["batch_id"], unique=False)
    op.create_index("lanes_open", "lanes", ["id"], unique=False, postgresql_where=sa.text("open"))
    op.create_index(
        "lanes_one", "lanes", ["tenant", sa.text(f"coalesce(batch_id, {NO_BATCH})"), "priority"], unique=True
    )


def _give_jobs_their_lanes() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "lane_id",
            sa.BigInteger(),
            nullable=True,
            comment="In lanes; never changes. No foreign key: it would be looked up for each row of a bulk submission.",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "work",
            sa.Double(),
            nullable=True,
            comment="Megapixel-steps (ImageRequest.work): what fairness counts; never changes.",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "checkpoint_key",
            sa.Text(),
            nullable=True,
            comment="Where its unfinished image is in the bucket; set by checkpoint, cleared by an end.",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "checkpoint_step",
            sa.SmallInteger(),
            nullable=False,
            server_default=sa.text("0"),
            comment="Steps done in that image; set and cleared with its key.",
        ),
    )
    op.execute(FILL_LANES)
    op.drop_index("jobs_state", table_name="jobs")
    op.execute(FILL_JOBS)
    op.alter_column("jobs", "work", nullable=False)
    op.alter_column("jobs", "lane_id", nullable=False)
    op.create_index("jobs_lane", "jobs", ["state", "lane_id", "not_before", "seq"], unique=False)


def _create_submissions() -> None:
    op.create_table(
        "submissions",
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose key it is."),
        sa.Column("key", sa.Text(), nullable=False, comment="The idempotency key as the client gave it."),
        sa.Column(
            "fingerprint", sa.Text(), nullable=False, comment="SHA-256 in hex of what was submitted with it."
        ),
        sa.Column("job_id", sa.Uuid(), nullable=True, comment="What came of it, or"),
        sa.Column("batch_id", sa.Uuid(), nullable=True, comment="what came of it."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Submission.",
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("submissions_job_id_fkey"), ondelete="CASCADE",
            deferrable=True, initially="DEFERRED",
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("submissions_batch_id_fkey"), ondelete="CASCADE",
            deferrable=True, initially="DEFERRED",
        ),
        sa.PrimaryKeyConstraint("tenant", "key", name=op.f("submissions_pkey")),
        comment="One row per idempotency key, written in the submitting transaction; kept as long as what came of it.",
    )  # fmt: skip
    op.create_index("submissions_job", "submissions", ["job_id"], unique=False)
    op.create_index("submissions_batch", "submissions", ["batch_id"], unique=False)


def downgrade() -> None:
    op.drop_table("submissions")
    op.drop_index("jobs_lane", table_name="jobs")
    op.create_index("jobs_state", "jobs", ["state", "priority", "seq"], unique=False)
    for column in ("checkpoint_step", "checkpoint_key", "work", "lane_id", "tenant"):
        op.drop_column("jobs", column)
    op.drop_table("lanes")
    op.drop_table("tenants")
    for column in ("weight", "tenant"):
        op.drop_column("batches", column)
