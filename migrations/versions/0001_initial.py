"""The first schema: batches, jobs, their claims, the window of messages, workers, leader; two views for dashboards.

Revision: 0001, after nothing
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

OPS_BACKLOG = """
    CREATE VIEW ops_backlog AS
    SELECT (ARRAY['interactive', 'standard', 'bulk'])[priority + 1] AS priority,
           count(*) FILTER (WHERE state = 'queued' AND not_before <= now()) AS waiting,
           count(*) FILTER (WHERE state = 'queued' AND not_before > now()) AS delayed,
           count(*) FILTER (WHERE state = 'running') AS running,
           extract(epoch FROM now() - min(created_at) FILTER (WHERE state = 'queued'))::float AS oldest_waiting_s
    FROM jobs WHERE state IN ('queued', 'running') GROUP BY priority
"""

OPS_WORKERS = """
    CREATE VIEW ops_workers AS
    SELECT w.id, w.host, w.pid, w.device, w.model, w.revision, w.version, w.capacity, w.started_at, w.heartbeat_at,
           extract(epoch FROM now() - w.heartbeat_at)::float AS heartbeat_age_s,
           coalesce(held.jobs, 0) AS running, coalesce(drawn.jobs, 0) AS images_last_hour
    FROM workers w
    LEFT JOIN (SELECT worker_id, count(*) AS jobs FROM jobs WHERE state = 'running' GROUP BY worker_id) AS held
           ON held.worker_id = w.id
    LEFT JOIN (SELECT worker_id, count(*) AS jobs FROM jobs
               WHERE state = 'succeeded' AND finished_at > now() - interval '1 hour' GROUP BY worker_id) AS drawn
           ON drawn.worker_id = w.id
    WHERE w.stopped_at IS NULL AND w.heartbeat_at > now() - interval '1 hour'
"""


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.Uuid(), nullable=False, comment="Given by the submitting side; never changes."),
        sa.Column("name", sa.Text(), nullable=False, comment="Given by the submitting side; never changes."),
        sa.Column(
            "jobs",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Set in the submitting transaction; never changes.",
        ),
        sa.Column(
            "paused",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="Changed by a person; no job of a paused batch is claimed.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Submission; never changes.",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("batches_pkey")),
    )
    op.create_index("batches_created", "batches", ["created_at"], unique=False)
    op.create_table(
        "leader",
        sa.Column("post", sa.Text(), nullable=False, comment="What is led: 'dispatcher'."),
        sa.Column(
            "holder",
            sa.Uuid(),
            nullable=False,
            comment="The dispatcher that leads; changed by the one that takes over.",
        ),
        sa.Column(
            "expires_at", sa.DateTime(timezone=True), nullable=False, comment="Renewed every second by the holder."
        ),
        sa.PrimaryKeyConstraint("post", name=op.f("leader_pkey")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False, comment="One process start; never changes."),
        sa.Column("host", sa.Text(), nullable=False, comment="Never changes."),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Never changes."),
        sa.Column("device", sa.Text(), nullable=False, comment="Never changes."),
        sa.Column("model", sa.Text(), nullable=False, comment="Never changes."),
        sa.Column("revision", sa.Text(), nullable=False, comment="Never changes."),
        sa.Column("version", sa.Text(), nullable=False, comment="Of ovis-batch; never changes."),
        sa.Column("capacity", sa.Integer(), nullable=False, comment="Images at once; never changes."),
        sa.Column(
            "drawing",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'[]'"),
            nullable=False,
            comment="What it draws: job, step, steps; set by each heartbeat.",
        ),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Never changes.",
        ),
        sa.Column(
            "heartbeat_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Set by each heartbeat.",
        ),
        sa.Column(
            "stopped_at", sa.DateTime(timezone=True), nullable=True, comment="Set once, by a worker that ends in order."
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("workers_pkey")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False, comment="Given at submission; never changes."),
        sa.Column(
            "seq",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="Order of submission; never changes.",
        ),
        sa.Column("batch_id", sa.Uuid(), nullable=True, comment="NULL for a job submitted alone; never changes."),
        sa.Column(
            "position",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Row in its batch, from 0; never changes.",
        ),
        sa.Column("name", sa.Text(), nullable=True, comment="Name of the output without suffix; never changes."),
        sa.Column(
            "priority",
            sa.SmallInteger(),
            nullable=False,
            comment="Rank of contract.Priority, 0 goes first; given at submission.",
        ),
        sa.Column(
            "request",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="pipeline.request.ImageRequest with its seed; never changes.",
        ),
        sa.Column("max_failures", sa.SmallInteger(), nullable=False, comment="Given at submission; never changes."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Submission; never changes.",
        ),
        sa.Column(
            "state",
            sa.Text(),
            server_default=sa.text("'queued'"),
            nullable=False,
            comment="contract.State; changed by claim, record, settle, drain, reclaim and cancel.",
        ),
        sa.Column(
            "claim",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Raised by each claim; only grows.",
        ),
        sa.Column(
            "worker_id", sa.Uuid(), nullable=True, comment="Set by claim, cleared when the claim ends without an image."
        ),
        sa.Column(
            "failures",
            sa.SmallInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Raised when a claim ends badly through the job or the worker.",
        ),
        sa.Column(
            "suspect",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="Set by reclaim: its worker died. From then on it is drawn alone.",
        ),
        sa.Column(
            "drawn_alone",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="Set by the worker when a suspect has the process to itself; cleared by claim.",
        ),
        sa.Column(
            "not_before",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Set at submission, and by a failure that is tried again later.",
        ),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True, comment="Set by each claim."),
        sa.Column(
            "finished_at", sa.DateTime(timezone=True), nullable=True, comment="Set once, with the terminal state."
        ),
        sa.Column("error_code", sa.Text(), nullable=True, comment="Class of the last failure; cleared by success."),
        sa.Column(
            "error_message",
            sa.Text(),
            nullable=True,
            comment="What a person should read of the last failure; cleared by success.",
        ),
        sa.Column("object_key", sa.Text(), nullable=True, comment="Where the image is in the bucket; set by record."),
        sa.Column("sha256", sa.Text(), nullable=True, comment="Of the object, in hex; set by record."),
        sa.Column("size_bytes", sa.Integer(), nullable=True, comment="Of the object; set by record."),
        sa.Column("width_px", sa.Integer(), nullable=True, comment="Of the image; set by record."),
        sa.Column("height_px", sa.Integer(), nullable=True, comment="Of the image; set by record."),
        sa.Column("format", sa.Text(), nullable=True, comment="pipeline.request.ImageFormat; set by record."),
        sa.Column(
            "waiting_s",
            sa.Double(),
            nullable=True,
            comment="From submission (or the last release) to the claim; set by claim.",
        ),
        sa.Column("drawing_s", sa.Double(), nullable=True, comment="In the engine; set by record."),
        sa.Column("encoding_s", sa.Double(), nullable=True, comment="Pixels to file; set by record."),
        sa.Column("uploading_s", sa.Double(), nullable=True, comment="File to bucket; set by record."),
        sa.Column(
            "warnings",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="What to know before trusting the image; set by record.",
        ),
        sa.CheckConstraint("state <> 'running' OR worker_id IS NOT NULL", name=op.f("jobs_running_has_worker")),
        sa.CheckConstraint(
            "state <> 'succeeded' OR (object_key IS NOT NULL AND sha256 IS NOT NULL)",
            name=op.f("jobs_succeeded_has_image"),
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("jobs_state_known")
        ),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("jobs_batch_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
        sa.UniqueConstraint("seq", name=op.f("jobs_seq_key")),
    )
    op.create_index("jobs_batch", "jobs", ["batch_id", "position"], unique=False)
    op.create_index("jobs_finished", "jobs", ["state", "finished_at"], unique=False)
    op.create_index("jobs_state", "jobs", ["state", "priority", "seq"], unique=False)
    op.create_table(
        "claims",
        sa.Column("job_id", sa.Uuid(), nullable=False, comment="Set by claim."),
        sa.Column("claim", sa.Integer(), nullable=False, comment="Set by claim."),
        sa.Column("worker_id", sa.Uuid(), nullable=False, comment="Set by claim."),
        sa.Column(
            "claimed_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Set by claim.",
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True, comment="Set once, when the claim ends."),
        sa.Column("outcome", sa.Text(), nullable=True, comment="contract.Outcome; set once, when the claim ends."),
        sa.Column(
            "error",
            sa.Text(),
            nullable=True,
            comment="What went wrong, with its traceback where it is of no known class; set once.",
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("claims_job_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "claim", name=op.f("claims_pkey")),
        comment="The history: one row per claim, kept as long as the job.",
    )
    op.create_table(
        "messages",
        sa.Column("job_id", sa.Uuid(), nullable=False, comment="Set by the dispatcher."),
        sa.Column(
            "claim",
            sa.Integer(),
            nullable=False,
            comment="The claim that the message is meant for; set by the dispatcher.",
        ),
        sa.Column(
            "published_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Set by the dispatcher, again by its audit.",
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("messages_job_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("messages_pkey")),
        comment="The window: what Redis should hold. A row is removed by the claim, a cancel, or the audit.",
    )
    op.execute(OPS_BACKLOG)
    op.execute(OPS_WORKERS)


def downgrade() -> None:
    op.execute("DROP VIEW ops_workers")
    op.execute("DROP VIEW ops_backlog")
    op.drop_table("messages")
    op.drop_table("claims")
    op.drop_index("jobs_state", table_name="jobs")
    op.drop_index("jobs_finished", table_name="jobs")
    op.drop_index("jobs_batch", table_name="jobs")
    op.drop_table("jobs")
    op.drop_table("workers")
    op.drop_table("leader")
    op.drop_index("batches_created", table_name="batches")
    op.drop_table("batches")
