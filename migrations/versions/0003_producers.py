"""What bulk users ask for: rejected lines, uploaded files, keys and limits, events and webhooks, shared images.

Revision: 0003, after 0002. Jobs that are there share no image with later ones, since they have no fingerprint.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "answers",
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose key it is."),
        sa.Column("key", sa.Text(), nullable=False, comment="The idempotency key as the client gave it."),
        sa.Column(
            "holder",
            sa.Uuid(),
            nullable=False,
            comment="Who answers it; changed by who takes it over from one that died.",
        ),
        sa.Column(
            "seen_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Last sign of the holder, renewed while it is at work; set a last time with the answer.",
        ),
        sa.Column(
            "status",
            sa.SmallInteger(),
            nullable=True,
            comment="HTTP status of the answer; set once; NULL: still at work.",
        ),
        sa.Column(
            "fingerprint", sa.Text(), nullable=True, comment="SHA-256 in hex of what was asked; set with status."
        ),
        sa.Column(
            "headers",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="Of the answer, in pairs; set with status.",
        ),
        sa.Column(
            "body", sa.LargeBinary(), nullable=True, comment="Of the answer; set with status; NULL: it is not kept."
        ),
        sa.PrimaryKeyConstraint("tenant", "key", name=op.f("answers_pkey")),
        comment="Answers to POSTs that carried an idempotency key; kept for some days.",
    )
    op.create_index("answers_seen", "answers", ["seen_at"], unique=False)
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False, comment="Never changes."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="On whose behalf it asks; never changes."),
        sa.Column("name", sa.Text(), nullable=False, comment="What a person calls it; never changes."),
        sa.Column(
            "scopes",
            postgresql.ARRAY(sa.Text()),
            nullable=False,
            comment="What it may do: contract.Scope; never changes.",
        ),
        sa.Column(
            "shown",
            sa.Text(),
            nullable=False,
            comment="Its first characters, by which a person knows it; never changes.",
        ),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="SHA-256 of the key; never changes."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Never changes.",
        ),
        sa.Column(
            "used_at", sa.DateTime(timezone=True), nullable=True, comment="When it was last used, to the minute."
        ),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True, comment="Set once, by a person."),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
        sa.UniqueConstraint("digest", name=op.f("api_keys_digest_key")),
        comment="Keys to the API. The key itself is shown once, when it is made, and kept nowhere.",
    )
    op.create_index("api_keys_tenant", "api_keys", ["tenant"], unique=False)
    op.create_table(
        "deletions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Never changes."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose images they were."),
        sa.Column(
            "prefixes",
            postgresql.ARRAY(sa.Text()),
            nullable=False,
            comment="Beginnings of the object keys that go; never changes.",
        ),
        sa.Column(
            "deleted_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the rows went; never changes.",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("deletions_pkey")),
        comment="What is still to go from the bucket, since its rows went; the sweep removes a row when it has.",
    )
    op.create_table(
        "events",
        sa.Column(
            "transaction",
            sa.BigInteger(),
            server_default=sa.text("pg_current_xact_id()::text::bigint"),
            nullable=False,
            comment="That wrote it, by which readers know what they have seen; never changes.",
        ),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Never changes."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose event it is; never changes."),
        sa.Column("batch_id", sa.Uuid(), nullable=True, comment="Never changes."),
        sa.Column("job_id", sa.Uuid(), nullable=True, comment="Never changes; NULL: of the batch."),
        sa.Column("kind", sa.Text(), nullable=False, comment="contract.EventKind; never changes."),
        sa.Column(
            "data", postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment="What it tells; never changes."
        ),
        sa.Column(
            "at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="Never changes."
        ),
        sa.PrimaryKeyConstraint("transaction", "id", name=op.f("events_pkey")),
        comment="What became of jobs and batches, written by triggers in the changing transaction; kept for some days.",
    )
    op.create_index("events_at", "events", ["at"], unique=False, postgresql_using="brin")
    op.create_index("events_batch", "events", ["batch_id", "transaction", "id"], unique=False)
    op.create_index("events_job", "events", ["job_id", "transaction", "id"], unique=False)
    op.create_table(
        "files",
        sa.Column("id", sa.Uuid(), nullable=False, comment="Never changes."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose file it is; never changes."),
        sa.Column("name", sa.Text(), nullable=False, comment="Given by the uploading side; never changes."),
        sa.Column("purpose", sa.Text(), nullable=False, comment="Given by the uploading side; never changes."),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False, comment="Of the object; never changes."),
        sa.Column("object_key", sa.Text(), nullable=False, comment="Where it is in the bucket; never changes."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Upload; never changes.",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("files_pkey")),
        comment="Uploaded inputs of batches.",
    )
    op.create_index("files_tenant", "files", ["tenant", "created_at"], unique=False)
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Uuid(), nullable=False, comment="Never changes."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose events are sent; never changes."),
        sa.Column("url", sa.Text(), nullable=False, comment="Where they are sent; never changes."),
        sa.Column(
            "secret",
            sa.Text(),
            nullable=False,
            comment="That signs them, as Standard Webhooks writes it; never changes.",
        ),
        sa.Column(
            "kinds",
            postgresql.ARRAY(sa.Text()),
            nullable=False,
            comment="contract.EventKind of what is sent; never changes.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Never changes.",
        ),
        sa.Column(
            "disabled_at", sa.DateTime(timezone=True), nullable=True, comment="Set by a 410; cleared by a person."
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("webhooks_pkey")),
        comment="Addresses that are told of events.",
    )
    op.create_index("webhooks_tenant", "webhooks", ["tenant"], unique=False)
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Uuid(), nullable=False, comment="Of the message, the same at each attempt; never changes."),
        sa.Column("webhook_id", sa.Uuid(), nullable=False, comment="Never changes."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose event it is; never changes."),
        sa.Column("kind", sa.Text(), nullable=False, comment="contract.EventKind; never changes."),
        sa.Column(
            "data", postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment="What it tells; never changes."
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it happened; never changes.",
        ),
        sa.Column(
            "attempts", sa.Integer(), server_default=sa.text("0"), nullable=False, comment="Raised by each attempt."
        ),
        sa.Column(
            "next_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Of the next attempt; set by each attempt and by a person; NULL: none is to come.",
        ),
        sa.Column(
            "delivered_at", sa.DateTime(timezone=True), nullable=True, comment="Set by the attempt that was taken."
        ),
        sa.Column(
            "last_status", sa.Integer(), nullable=True, comment="HTTP status of the last attempt; NULL: none came."
        ),
        sa.Column(
            "last_error", sa.Text(), nullable=True, comment="What was wrong with the last attempt; NULL: nothing."
        ),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name=op.f("deliveries_webhook_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("deliveries_pkey")),
        comment="Events on their way to webhooks, written with the event; kept for some days.",
    )
    op.create_index(
        "deliveries_due",
        "deliveries",
        ["webhook_id", "next_at"],
        unique=False,
        postgresql_where=sa.text("next_at IS NOT NULL"),
    )
    op.create_index("deliveries_webhook", "deliveries", ["webhook_id", "created_at"], unique=False)
    op.create_table(
        "rejections",
        sa.Column("batch_id", sa.Uuid(), nullable=False, comment="Its batch."),
        sa.Column("line", sa.Integer(), nullable=False, comment="Of the input, from 1."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose batch it is."),
        sa.Column("source", sa.JSON(), nullable=False, comment="What the line held, in its order."),
        sa.Column("code", sa.Text(), nullable=False, comment="What kind of fault it has."),
        sa.Column("message", sa.Text(), nullable=False, comment="What is wrong, in words."),
        sa.Column("field", sa.Text(), nullable=True, comment="Which field, if it is one."),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("rejections_batch_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "line", name=op.f("rejections_pkey")),
        comment="Lines of a batch's input that became no job; written in the submitting transaction; never changed.",
    )
    op.add_column(
        "batches",
        sa.Column(
            "rejected",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Lines in rejections; set in the submitting transaction; never changes.",
        ),
    )
    op.add_column(
        "batches",
        sa.Column(
            "file_id", sa.Text(), nullable=True, comment="The uploaded file that it was read from; never changes."
        ),
    )
    op.add_column(
        "batches",
        sa.Column(
            "metadata",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Given by the submitting side; never changes.",
        ),
    )
    op.add_column(
        "batches",
        sa.Column(
            "refused",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'[]'"),
            nullable=False,
            comment="Why the whole input was refused, so that there are no jobs; never changes.",
        ),
    )
    op.add_column(
        "batches",
        sa.Column(
            "cancelled_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Set by a person's cancel; cleared by a retry.",
        ),
    )
    op.add_column(
        "batches",
        sa.Column(
            "finished_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Set by the leader when nothing of it is queued or running; cleared by a retry.",
        ),
    )
    op.add_column(
        "batches",
        sa.Column(
            "counts",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="Its jobs by state, once it is finished; set and cleared with finished_at.",
        ),
    )
    op.execute(FINISH_BATCHES)
    op.create_index(
        "batches_unfinished", "batches", ["id"], unique=False, postgresql_where=sa.text("finished_at IS NULL")
    )
    op.create_index("batches_submitted_by", "batches", ["tenant", "created_at", "id"], unique=False)
    op.add_column(
        "jobs",
        sa.Column(
            "line", sa.Integer(), nullable=True, comment="Of the input that it came with, from 1; never changes."
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "source",
            sa.JSON(),
            nullable=True,
            comment="What that line held, in its order; never changes.",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "fingerprint",
            sa.LargeBinary(),
            nullable=True,
            comment="SHA-256 of the request with its seed; never changes.",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "previews",
            sa.SmallInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Unfinished pictures to be shown on the way; given at submission.",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "copy_of",
            sa.Uuid(),
            nullable=True,
            comment="The job whose image it shares; set at submission, if that was there already.",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "preview_key",
            sa.Text(),
            nullable=True,
            comment="Where its last preview is; set by preview, cleared when the claim ends.",
        ),
    )
    op.alter_column(
        "jobs",
        "priority",
        existing_type=sa.SMALLINT(),
        comment="Rank of contract.Priority, 0 goes first; changed by a person, together with its lane.",
        existing_nullable=False,
    )
    op.alter_column(
        "jobs",
        "lane_id",
        existing_type=sa.BIGINT(),
        comment="In lanes; changes with the priority. No foreign key: a bulk submission would look it up for each row.",
        existing_nullable=False,
    )
    _make_jobs_searchable()
    op.create_index(
        "jobs_copies", "jobs", ["object_key"], unique=False, postgresql_where=sa.text("copy_of IS NOT NULL")
    )
    op.create_index(
        "jobs_drawn", "jobs", ["fingerprint"], unique=False, postgresql_where=sa.text("state = 'succeeded'")
    )
    op.add_column(
        "tenants",
        sa.Column(
            "max_queued",
            sa.Integer(),
            nullable=True,
            comment="Jobs that may wait; changed by a person; NULL: no limit.",
        ),
    )
    op.add_column(
        "tenants",
        sa.Column(
            "max_a_day",
            sa.Integer(),
            nullable=True,
            comment="Jobs submitted in 24 hours; changed by a person; NULL: no limit.",
        ),
    )
    op.add_column(
        "tenants",
        sa.Column(
            "max_running",
            sa.Integer(),
            nullable=True,
            comment="Images drawn at once; changed by a person; NULL: no limit.",
        ),
    )
    op.add_column(
        "tenants",
        sa.Column(
            "max_requests_s",
            sa.Double(),
            nullable=True,
            comment="Requests a second; changed by a person; NULL: no limit.",
        ),
    )
    op.create_table_comment(
        "tenants",
        "Tenants that have a weight or a limit of their own: others need no row.",
        schema=None,
    )
    op.add_column(
        "workers",
        sa.Column(
            "speed",
            sa.Double(),
            nullable=True,
            comment="Megapixel-steps a second while it draws; set by each heartbeat; NULL: not known.",
        ),
    )


# The dispatcher would count them while it leads; and nobody waits to be told of them.
FINISH_BATCHES = """
    UPDATE batches SET finished_at = ended.at, counts = ended.counts
    FROM (
        SELECT batch_id, coalesce(max(at), now()) AS at, jsonb_object_agg(state, n) AS counts
        FROM (SELECT batch_id, state, count(*) AS n, max(finished_at) AS at
              FROM jobs WHERE batch_id IS NOT NULL GROUP BY batch_id, state) AS states
        GROUP BY batch_id HAVING bool_and(state NOT IN ('queued', 'running'))
    ) AS ended
    WHERE batches.id = ended.batch_id
"""

ENDED = sa.text("finished_at IS NOT NULL")
FAILED = sa.text("error_code IS NOT NULL")


def _make_jobs_searchable() -> None:
    op.create_table(
        "prompt_words",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Order of submission."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Whose prompts they are."),
        sa.Column("batch_id", sa.Uuid(), nullable=True, comment="In which they stand, or"),
        sa.Column(
            "job_id",
            sa.Uuid(),
            nullable=True,
            comment="the one job whose prompt it is. No foreign key: only batches are deleted.",
        ),
        sa.Column(
            "first_position",
            sa.Integer(),
            nullable=False,
            comment="In the batch: of the first of up to 100 jobs, and",
        ),
        sa.Column("last_position", sa.Integer(), nullable=False, comment="of the last of them."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="As that of the jobs.",
        ),
        sa.Column(
            "words", postgresql.TSVECTOR(), nullable=False, comment="Of all these prompts, and '@' with the tenant."
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("prompt_words_batch_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("prompt_words_pkey")),
        comment="Which neighbouring prompts hold which words; written in the submitting transaction; never changed.",
    )
    op.execute(WORDS_OF_JOBS)
    op.create_index("prompt_words_words", "prompt_words", ["words"], unique=False, postgresql_using="gin")
    op.create_index("prompt_words_batch", "prompt_words", ["batch_id", "first_position"], unique=False)
    op.create_index("jobs_submitted", "jobs", ["state", "created_at", "seq"], unique=False)
    op.create_index("jobs_submitted_by", "jobs", ["tenant", "state", "created_at", "seq"], unique=False)
    op.create_index(
        "jobs_submitted_in",
        "jobs",
        ["batch_id", "state", "created_at", "seq"],
        unique=False,
        postgresql_where=sa.text("batch_id IS NOT NULL"),
    )
    # A page of a tenant's jobs must follow the tenant's own index, however large its part of the farm is: as planned
    # for a large one, a walk through everybody's rows may meet none of its own for millions.
    op.execute("ALTER TABLE jobs ALTER COLUMN tenant TYPE text, ALTER COLUMN tenant SET STATISTICS 0")
    op.drop_index("jobs_finished", table_name="jobs")
    op.create_index("jobs_finished", "jobs", ["state", "finished_at", "seq"], unique=False, postgresql_where=ENDED)
    op.create_index(
        "jobs_finished_of",
        "jobs",
        ["tenant", "state", "finished_at", "seq"],
        unique=False,
        postgresql_where=ENDED,
    )
    op.create_index(
        "jobs_error", "jobs", ["error_code", "state", "created_at", "seq"], unique=False, postgresql_where=FAILED
    )
    op.create_index(
        "jobs_error_of",
        "jobs",
        ["tenant", "error_code", "state", "created_at", "seq"],
        unique=False,
        postgresql_where=FAILED,
    )


# Postgres takes no tsvector beyond 1 MB: so each row is of up to 100,000 characters, and of what is left of a prompt.
WORDS_OF_JOBS = r"""
    INSERT INTO prompt_words (tenant, batch_id, job_id, first_position, last_position, created_at, words)
    SELECT tenant, batch_id, single, min(position), max(position), min(created_at),
           array_to_tsvector(array_agg(DISTINCT left(word[1], 40)) || ('@' || tenant))
    FROM (
        SELECT *, CASE WHEN batch_id IS NULL THEN id END AS single,
               CASE WHEN batch_id IS NULL THEN 0 ELSE
                   sum(length(request ->> 'prompt')) OVER (PARTITION BY batch_id ORDER BY position) / 100000
               END AS characters
        FROM jobs
    ) AS jobs
    CROSS JOIN LATERAL regexp_matches(
        lower(request ->> 'prompt'),
        '[a-z0-9\u00C0-\u1FFF]+|[\u2E80-\u2FFF\u3005-\u9FFF\uAC00-\uD7AF\uF900-\uFAFF\U00020000-\U0003FFFF]', 'g'
    ) AS word
    GROUP BY tenant, batch_id, single, position / 100, characters ORDER BY min(seq)
"""


def _make_jobs_unsearchable() -> None:
    op.drop_index("jobs_error_of", table_name="jobs", postgresql_where=FAILED)
    op.drop_index("jobs_error", table_name="jobs", postgresql_where=FAILED)
    op.drop_index("jobs_finished_of", table_name="jobs", postgresql_where=ENDED)
    op.drop_index("jobs_finished", table_name="jobs", postgresql_where=ENDED)
    op.create_index("jobs_finished", "jobs", ["state", "finished_at"], unique=False)
    op.drop_index("jobs_submitted_in", table_name="jobs", postgresql_where=sa.text("batch_id IS NOT NULL"))
    op.execute("ALTER TABLE jobs ALTER COLUMN tenant SET STATISTICS -1")
    op.drop_index("jobs_submitted_by", table_name="jobs")
    op.drop_index("jobs_submitted", table_name="jobs")
    op.drop_table("prompt_words")


def downgrade() -> None:
    op.drop_column("workers", "speed")
    op.create_table_comment(
        "tenants",
        "Tenants whose weight is not 1: others need no row.",
        schema=None,
    )
    op.drop_column("tenants", "max_requests_s")
    op.drop_column("tenants", "max_running")
    op.drop_column("tenants", "max_a_day")
    op.drop_column("tenants", "max_queued")
    _make_jobs_unsearchable()
    op.drop_index("jobs_drawn", table_name="jobs", postgresql_where=sa.text("state = 'succeeded'"))
    op.drop_index("jobs_copies", table_name="jobs", postgresql_where=sa.text("copy_of IS NOT NULL"))
    op.alter_column(
        "jobs",
        "lane_id",
        existing_type=sa.BIGINT(),
        comment="In lanes; never changes. No foreign key: it would be looked up for each row of a bulk submission.",
        existing_nullable=False,
    )
    op.alter_column(
        "jobs",
        "priority",
        existing_type=sa.SMALLINT(),
        comment="Rank of contract.Priority, 0 goes first; given at submission.",
        existing_nullable=False,
    )
    op.drop_column("jobs", "preview_key")
    op.drop_column("jobs", "copy_of")
    op.drop_column("jobs", "previews")
    op.drop_column("jobs", "fingerprint")
    op.drop_column("jobs", "source")
    op.drop_column("jobs", "line")
    op.drop_index("batches_submitted_by", table_name="batches")
    op.drop_index("batches_unfinished", table_name="batches", postgresql_where=sa.text("finished_at IS NULL"))
    op.drop_column("batches", "counts")
    op.drop_column("batches", "finished_at")
    op.drop_column("batches", "cancelled_at")
    op.drop_column("batches", "refused")
    op.drop_column("batches", "metadata")
    op.drop_column("batches", "file_id")
    op.drop_column("batches", "rejected")
    op.drop_table("rejections")
    op.drop_index("deliveries_webhook", table_name="deliveries")
    op.drop_index("deliveries_due", table_name="deliveries", postgresql_where=sa.text("next_at IS NOT NULL"))
    op.drop_table("deliveries")
    op.drop_index("webhooks_tenant", table_name="webhooks")
    op.drop_table("webhooks")
    op.drop_index("files_tenant", table_name="files")
    op.drop_table("files")
    op.drop_index("events_job", table_name="events")
    op.drop_index("events_batch", table_name="events")
    op.drop_index("events_at", table_name="events")
    op.drop_table("events")
    op.drop_table("deletions")
    op.drop_index("api_keys_tenant", table_name="api_keys")
    op.drop_table("api_keys")
    op.drop_index("answers_seen", table_name="answers")
    op.drop_table("answers")
