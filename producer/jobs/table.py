"""The SQLAlchemy tables. Each column says when it changes and who changes it.

Times are the database's clock. Statements are in ``store``; the schema's history is in ``migrations/``; the test
``tests/migration`` holds the two together.

No index names a column that changes often, or an update would not be HOT; the state is the exception, in ``jobs_lane``
and the indexes that ``search`` pages by (``not_before``, ``finished_at`` and ``error_code`` change only together with
it).
"""

from uuid import UUID

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TSVECTOR

from producer.jobs.contract import State

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ck": "%(constraint_name)s",
    }
)


def _time(name: str, comment: str, **options: object) -> Column[object]:
    return Column(name, DateTime(timezone=True), comment=comment, **options)  # type: ignore[arg-type]


batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Given by the submitting side; never changes."),
    Column("tenant", Text, nullable=False, comment="Whose batch it is; never changes."),
    Column("name", Text, nullable=False, comment="Given by the submitting side; never changes."),
    Column(
        "weight",
        Double,
        nullable=False,
        server_default=text("1"),
        comment="Of its share beside the tenant's other batches; given at submission.",
    ),
    Column(
        "jobs",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Set in the submitting transaction; never changes.",
    ),
    Column(
        "lines",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Of the input that became jobs; set in the submitting transaction; never changes.",
    ),
    Column(
        "rejected",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Lines in rejections; set in the submitting transaction; never changes.",
    ),
    Column("file_id", Text, comment="The uploaded file that it was read from; never changes."),
    Column(
        "metadata",
        JSONB,
        nullable=False,
        server_default=text("'{}'"),
        comment="Given by the submitting side; never changes.",
    ),
    Column(
        "refused",
        JSONB,
        nullable=False,
        server_default=text("'[]'"),
        comment="Why the whole input was refused, so that there are no jobs; never changes.",
    ),
    Column(
        "paused",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Changed by a person; no job of a paused batch is claimed.",
    ),
    _time("cancelled_at", "Set by a person's cancel; cleared by a retry."),
    _time("finished_at", "Set by the leader when nothing of it is queued or running; cleared by a retry."),
    _time("created_at", "Submission; never changes.", nullable=False, server_default=func.now()),
    Index("batches_created", "created_at"),
    Index("batches_submitted_by", "tenant", "created_at", "id"),
    Index("batches_unfinished", "id", postgresql_where=text("finished_at IS NULL")),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", Text, primary_key=True, comment="Never changes."),
    Column("weight", Double, nullable=False, comment="Of its share beside other tenants; changed by a person."),
    Column("max_queued", Integer, comment="Jobs that may wait; changed by a person; NULL: no limit."),
    Column("max_a_day", Integer, comment="Jobs submitted in 24 hours; changed by a person; NULL: no limit."),
    Column("max_running", Integer, comment="Images drawn at once; changed by a person; NULL: no limit."),
    Column("max_requests_s", Double, comment="Requests a second; changed by a person; NULL: no limit."),
    comment="Tenants that have a weight or a limit of their own: others need no row.",
)

submitted = Table(
    "submitted",
    metadata,
    Column("tenant", Text, primary_key=True, comment="Whose jobs they were; never changes."),
    _time("hour", "Its beginning; never changes.", primary_key=True),
    Column("jobs", BigInteger, nullable=False, comment="Raised by each submission in that hour."),
    comment="Jobs submitted by tenants that have a limit a day, deleted ones too; kept for a day.",
)

lanes = Table(
    "lanes",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True, comment="Never changes."),
    Column("tenant", Text, nullable=False, comment="Never changes."),
    Column(
        "batch_id",
        Uuid,
        ForeignKey("batches.id", ondelete="CASCADE"),
        comment="NULL: the tenant's jobs that were submitted alone; never changes.",
    ),
    Column("priority", SmallInteger, nullable=False, comment="Rank of contract.Priority; never changes."),
    Column(
        "open",
        Boolean,
        nullable=False,
        comment="Set in each transaction that queues a job of the lane; taken back by the leader, who finds none.",
    ),
    Index("lanes_of_batch", "batch_id"),
    Index("lanes_open", "id", postgresql_where=text("open")),
    comment="The jobs of one tenant, one batch (or none) and one priority: what the fair order chooses between.",
)
Index(
    "lanes_one",
    lanes.c.tenant,
    func.coalesce(lanes.c.batch_id, text(f"'{UUID(int=0)}'::uuid")),
    lanes.c.priority,
    unique=True,
)

jobs = Table(
    "jobs",
    metadata,
    # What was handed in: never changes after submission.
    Column("id", Uuid, primary_key=True, comment="Given at submission; never changes."),
    Column(
        "seq",
        BigInteger,
        Identity(always=True),
        nullable=False,
        unique=True,
        comment="Order of submission; never changes.",
    ),
    Column(
        "batch_id",
        Uuid,
        ForeignKey("batches.id", ondelete="CASCADE"),
        comment="NULL for a job submitted alone; never changes.",
    ),
    Column(
        "position",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Row in its batch, from 0; never changes.",
    ),
    Column("line", Integer, comment="Of the input that it came with, from 1; never changes."),
    Column("source", JSON, comment="What that line held, in its order; never changes."),
    Column("name", Text, comment="Name of the output without suffix; never changes."),
    Column(
        "priority",
        SmallInteger,
        nullable=False,
        comment="Rank of contract.Priority, 0 goes first; changed by a person, together with its lane.",
    ),
    Column("tenant", Text, nullable=False, comment="Whose job it is; never changes."),
    Column(
        "lane_id",
        BigInteger,
        nullable=False,
        comment="In lanes; changes with the priority. No foreign key: a bulk submission would look it up for each row.",
    ),
    Column(
        "work",
        Double,
        nullable=False,
        comment="Megapixel-steps (ImageRequest.work): what fairness counts; never changes.",
    ),
    Column("request", JSONB, nullable=False, comment="pipeline.request.ImageRequest with its seed; never changes."),
    Column("fingerprint", LargeBinary, comment="SHA-256 of the request with its seed; never changes."),
    Column(
        "previews",
        SmallInteger,
        nullable=False,
        server_default=text("0"),
        comment="Unfinished pictures to be shown on the way; given at submission.",
    ),
    Column("max_failures", SmallInteger, nullable=False, comment="Given at submission; never changes."),
    _time("created_at", "Submission; never changes.", nullable=False, server_default=func.now()),
    # Where it is.
    Column(
        "state",
        Text,
        nullable=False,
        server_default=text("'queued'"),
        comment="contract.State; changed by claim, record, settle, drain, reclaim and cancel.",
    ),
    Column("claim", Integer, nullable=False, server_default=text("0"), comment="Raised by each claim; only grows."),
    Column("worker_id", Uuid, comment="Set by claim, cleared when the claim ends without an image."),
    Column(
        "failures",
        SmallInteger,
        nullable=False,
        server_default=text("0"),
        comment="Raised when a claim ends badly through the job or the worker.",
    ),
    Column(
        "suspect",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Set by reclaim: its worker died. From then on it is drawn alone.",
    ),
    Column(
        "drawn_alone",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Set by the worker when a suspect has the process to itself; cleared by claim.",
    ),
    Column(
        "checkpoint_key",
        Text,
        comment="Where its unfinished image is in the bucket; set by checkpoint, cleared by an end.",
    ),
    Column(
        "checkpoint_step",
        SmallInteger,
        nullable=False,
        server_default=text("0"),
        comment="Steps done in that image; set and cleared with its key.",
    ),
    _time(
        "not_before",
        "Set at submission, and by a failure that is tried again later.",
        nullable=False,
        server_default=func.now(),
    ),
    _time("claimed_at", "Set by each claim."),
    _time("finished_at", "Set once, with the terminal state."),
    # How it ended: set once with the terminal state; the error also by a failure that is tried again.
    Column("error_code", Text, comment="Class of the last failure; cleared by success."),
    Column("error_message", Text, comment="What a person should read of the last failure; cleared by success."),
    Column("object_key", Text, comment="Where the image is in the bucket; set by record."),
    Column("copy_of", Uuid, comment="The job whose image it shares; set at submission, if that was there already."),
    Column("preview_key", Text, comment="Where its last preview is; set by preview, cleared when the claim ends."),
    Column("sha256", Text, comment="Of the object, in hex; set by record."),
    Column("size_bytes", Integer, comment="Of the object; set by record."),
    Column("width_px", Integer, comment="Of the image; set by record."),
    Column("height_px", Integer, comment="Of the image; set by record."),
    Column("format", Text, comment="pipeline.request.ImageFormat; set by record."),
    Column("waiting_s", Double, comment="From submission (or the last release) to the claim; set by claim."),
    Column("drawing_s", Double, comment="In the engine; set by record."),
    Column("encoding_s", Double, comment="Pixels to file; set by record."),
    Column("uploading_s", Double, comment="File to bucket; set by record."),
    Column(
        "warnings",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'"),
        comment="What to know before trusting the image; set by record.",
    ),
    CheckConstraint(f"state IN ({', '.join(repr(s.value) for s in State)})", name="jobs_state_known"),
    CheckConstraint("state <> 'running' OR worker_id IS NOT NULL", name="jobs_running_has_worker"),
    CheckConstraint(
        "state <> 'succeeded' OR (object_key IS NOT NULL AND sha256 IS NOT NULL)", name="jobs_succeeded_has_image"
    ),
    Index("jobs_lane", "state", "lane_id", "not_before", "seq"),
    Index("jobs_batch", "batch_id", "position"),
    Index("jobs_submitted", "state", "created_at", "seq"),
    Index("jobs_submitted_by", "tenant", "state", "created_at", "seq"),
    Index("jobs_submitted_in", "batch_id", "state", "created_at", "seq", postgresql_where=text("batch_id IS NOT NULL")),
    Index("jobs_finished", "state", "finished_at", "seq", postgresql_where=text("finished_at IS NOT NULL")),
    Index(
        "jobs_finished_of", "tenant", "state", "finished_at", "seq", postgresql_where=text("finished_at IS NOT NULL")
    ),
    Index("jobs_error", "error_code", "state", "created_at", "seq", postgresql_where=text("error_code IS NOT NULL")),
    Index(
        "jobs_error_of",
        "tenant",
        "error_code",
        "state",
        "created_at",
        "seq",
        postgresql_where=text("error_code IS NOT NULL"),
    ),
    Index("jobs_drawn", "fingerprint", postgresql_where=text("state = 'succeeded'")),
    Index("jobs_copies", "object_key", postgresql_where=text("copy_of IS NOT NULL")),
)

prompt_words = Table(
    "prompt_words",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True, comment="Order of submission."),
    Column("tenant", Text, nullable=False, comment="Whose prompts they are."),
    Column("batch_id", Uuid, ForeignKey("batches.id", ondelete="CASCADE"), comment="In which they stand, or"),
    Column("job_id", Uuid, comment="the one job whose prompt it is. No foreign key: only batches are deleted."),
    Column("first_position", Integer, nullable=False, comment="In the batch: of the first of up to 100 jobs, and"),
    Column("last_position", Integer, nullable=False, comment="of the last of them."),
    _time("created_at", "As that of the jobs.", nullable=False, server_default=func.now()),
    Column("words", TSVECTOR, nullable=False, comment="Of all these prompts, and '@' with the tenant."),
    Index("prompt_words_words", "words", postgresql_using="gin"),
    Index("prompt_words_submitted", "created_at", "id"),
    Index("prompt_words_submitted_by", "tenant", "created_at", "id"),
    Index("prompt_words_submitted_in", "batch_id", "created_at", "id"),
    comment="Which neighbouring prompts hold which words; written in the submitting transaction; never changed.",
)

claims = Table(
    "claims",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, comment="Set by claim."),
    Column("claim", Integer, primary_key=True, comment="Set by claim."),
    Column("worker_id", Uuid, nullable=False, comment="Set by claim."),
    _time("claimed_at", "Set by claim.", nullable=False, server_default=func.now()),
    _time("ended_at", "Set once, when the claim ends."),
    Column("outcome", Text, comment="contract.Outcome; set once, when the claim ends."),
    Column("error", Text, comment="What went wrong, with its traceback where it is of no known class; set once."),
    comment="The history: one row per claim, kept as long as the job.",
)

rejections = Table(
    "rejections",
    metadata,
    Column("batch_id", Uuid, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True, comment="Its batch."),
    Column("line", Integer, primary_key=True, comment="Of the input, from 1."),
    Column("tenant", Text, nullable=False, comment="Whose batch it is."),
    Column("source", JSON, nullable=False, comment="What the line held, in its order."),
    Column("code", Text, nullable=False, comment="What kind of fault it has."),
    Column("message", Text, nullable=False, comment="What is wrong, in words."),
    Column("field", Text, comment="Which field, if it is one."),
    comment="Lines of a batch's input that became no job; written in the submitting transaction; never changed.",
)

deletions = Table(
    "deletions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True, comment="Never changes."),
    Column("tenant", Text, nullable=False, comment="Whose objects they are."),
    Column("prefixes", ARRAY(Text), nullable=False, comment="Beginnings of the object keys that go; never changes."),
    _time("deleted_at", "When that was noted; never changes.", nullable=False, server_default=func.now()),
    comment="What is to go from the bucket: its rows went, or never came, as of an upload that was broken off;"
    " the sweep removes a row when it has gone.",
)

submissions = Table(
    "submissions",
    metadata,
    Column("tenant", Text, primary_key=True, comment="Whose key it is."),
    Column("key", Text, primary_key=True, comment="The idempotency key as the client gave it."),
    Column("fingerprint", Text, nullable=False, comment="SHA-256 in hex of what was submitted with it."),
    Column(
        "job_id",
        Uuid,
        ForeignKey("jobs.id", ondelete="SET NULL", deferrable=True, initially="DEFERRED"),
        comment="What came of it, or",
    ),
    Column(
        "batch_id",
        Uuid,
        ForeignKey("batches.id", ondelete="SET NULL", deferrable=True, initially="DEFERRED"),
        comment="what came of it; both NULL: it was deleted.",
    ),
    _time("created_at", "Submission.", nullable=False, server_default=func.now()),
    Index("submissions_job", "job_id"),
    Index("submissions_batch", "batch_id"),
    Index("submissions_created", "created_at"),
    comment="One row per idempotency key, written in the submitting transaction; kept for some days.",
)

messages = Table(
    "messages",
    metadata,
    Column(
        "job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, comment="Set by the dispatcher."
    ),
    Column("claim", Integer, nullable=False, comment="The claim that the message is meant for; set by the dispatcher."),
    _time("published_at", "Set by the dispatcher, again by its audit.", nullable=False, server_default=func.now()),
    comment="The window: what Redis should hold. A row is removed by the claim, a cancel, or the audit.",
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True, comment="One process start; never changes."),
    Column("host", Text, nullable=False, comment="Never changes."),
    Column("pid", Integer, nullable=False, comment="Never changes."),
    Column("device", Text, nullable=False, comment="Never changes."),
    Column("model", Text, nullable=False, comment="Never changes."),
    Column("revision", Text, nullable=False, comment="Never changes."),
    Column("version", Text, nullable=False, comment="Of ovis-batch; never changes."),
    Column("capacity", Integer, nullable=False, comment="Images at once; never changes."),
    Column(
        "drawing",
        JSONB,
        nullable=False,
        server_default=text("'[]'"),
        comment="What it draws: job, step, steps; set by each heartbeat.",
    ),
    Column("speed", Double, comment="Megapixel-steps a second while it draws; set by each heartbeat; NULL: not known."),
    _time("started_at", "Never changes.", nullable=False, server_default=func.now()),
    _time("heartbeat_at", "Set by each heartbeat.", nullable=False, server_default=func.now()),
    _time("stopped_at", "Set once, by a worker that ends in order."),
)

leader = Table(
    "leader",
    metadata,
    Column("post", Text, primary_key=True, comment="What is led: 'dispatcher'."),
    Column("holder", Uuid, nullable=False, comment="The dispatcher that leads; changed by the one that takes over."),
    _time("expires_at", "Renewed every second by the holder.", nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Never changes."),
    Column("tenant", Text, nullable=False, comment="On whose behalf it asks; never changes."),
    Column("name", Text, nullable=False, comment="What a person calls it; never changes."),
    Column("scopes", ARRAY(Text), nullable=False, comment="What it may do: contract.Scope; never changes."),
    Column("shown", Text, nullable=False, comment="Its first characters, by which a person knows it; never changes."),
    Column("digest", LargeBinary, nullable=False, unique=True, comment="SHA-256 of the key; never changes."),
    _time("created_at", "Never changes.", nullable=False, server_default=func.now()),
    _time("used_at", "When it was last used, to the minute."),
    _time("revoked_at", "Set once, by a person."),
    Index("api_keys_tenant", "tenant"),
    comment="Keys to the API. The key itself is shown once, when it is made, and kept nowhere.",
)

files = Table(
    "files",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Never changes."),
    Column("tenant", Text, nullable=False, comment="Whose file it is; never changes."),
    Column("name", Text, nullable=False, comment="Given by the uploading side; never changes."),
    Column("purpose", Text, nullable=False, comment="Given by the uploading side; never changes."),
    Column("size_bytes", BigInteger, nullable=False, comment="Of the object; never changes."),
    Column("object_key", Text, nullable=False, comment="Where it is in the bucket; never changes."),
    _time("created_at", "Upload; never changes.", nullable=False, server_default=func.now()),
    Index("files_tenant", "tenant", "created_at"),
    comment="Uploaded inputs of batches.",
)

tallies = Table(
    "tallies",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True, comment="Never changes."),
    Column("tenant", Text, nullable=False, comment="Whose jobs; never changes."),
    Column("batch_id", Uuid, comment="NULL: all of the tenant's, in batches or alone; never changes."),
    Column("priority", SmallInteger, nullable=False, comment="Rank of contract.Priority; never changes."),
    Column("state", Text, nullable=False, comment="contract.State; never changes."),
    Column("jobs", Integer, nullable=False, comment="That came into the state, less those that left it."),
    Column(
        "pixel_steps",
        BigInteger,
        nullable=False,
        comment="Their work; a million is a megapixel-step: whole numbers, so that no sum is rounded.",
    ),
    _time("at", "When the last of them did.", nullable=False, server_default=func.now()),
    Column(
        "folded",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="The one row to which the leader adds the others, so that there are few; never changes.",
    ),
    Index("tallies_batch", "batch_id"),
    Index("tallies_tenant", "tenant", postgresql_where=text("batch_id IS NULL")),
    Index("tallies_new", "id", postgresql_where=text("NOT folded")),
    Index("tallies_empty", "id", postgresql_where=text("folded AND jobs = 0")),
    comment="Jobs by state: how many are in it is the sum of the rows. Triggers write them, the leader adds up.",
)
Index(
    "tallies_folded",
    tallies.c.tenant,
    func.coalesce(tallies.c.batch_id, text(f"'{UUID(int=0)}'::uuid")),
    tallies.c.priority,
    tallies.c.state,
    unique=True,
    postgresql_where=text("folded"),
)

events = Table(
    "events",
    metadata,
    Column(
        "transaction",
        BigInteger,
        primary_key=True,
        server_default=text("pg_current_xact_id()::text::bigint"),
        comment="That wrote it, by which readers know what they have seen; never changes.",
    ),
    Column("id", BigInteger, Identity(always=True), primary_key=True, comment="Never changes."),
    Column("tenant", Text, nullable=False, comment="Whose event it is; never changes."),
    Column("batch_id", Uuid, comment="Never changes."),
    Column("job_id", Uuid, comment="Never changes; NULL: of the batch."),
    Column("kind", Text, nullable=False, comment="contract.EventKind; never changes."),
    Column("data", JSONB, nullable=False, comment="What it tells; never changes."),
    _time("at", "Never changes.", nullable=False, server_default=func.now()),
    Index("events_batch", "batch_id", "transaction", "id"),
    Index("events_job", "job_id", "transaction", "id"),
    Index("events_at", "at", postgresql_using="brin"),
    comment="What became of jobs and batches, written by triggers in the changing transaction; kept for some days.",
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Never changes."),
    Column("tenant", Text, nullable=False, comment="Whose events are sent; never changes."),
    Column("url", Text, nullable=False, comment="Where they are sent; never changes."),
    Column("secret", Text, nullable=False, comment="That signs them, as Standard Webhooks writes it; never changes."),
    Column("kinds", ARRAY(Text), nullable=False, comment="contract.EventKind of what is sent; never changes."),
    _time("created_at", "Never changes.", nullable=False, server_default=func.now()),
    _time("disabled_at", "Set by a 410; cleared by a person."),
    Index("webhooks_tenant", "tenant"),
    comment="Addresses that are told of events.",
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Of the message, the same at each attempt; never changes."),
    Column("webhook_id", Uuid, ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False, comment="Never changes."),
    Column("tenant", Text, nullable=False, comment="Whose event it is; never changes."),
    Column("kind", Text, nullable=False, comment="contract.EventKind; never changes."),
    Column("data", JSONB, nullable=False, comment="What it tells; never changes."),
    _time("created_at", "When it happened; never changes.", nullable=False, server_default=func.now()),
    Column("attempts", Integer, nullable=False, server_default=text("0"), comment="Raised by each attempt."),
    _time("next_at", "Of the next attempt; set by each attempt and by a person; NULL: none is to come."),
    _time("delivered_at", "Set by the attempt that was taken."),
    Column("last_status", Integer, comment="HTTP status of the last attempt; NULL: none came."),
    Column("last_error", Text, comment="What was wrong with the last attempt; NULL: nothing."),
    Index("deliveries_due", "webhook_id", "next_at", postgresql_where=text("next_at IS NOT NULL")),
    Index("deliveries_webhook", "webhook_id", "created_at"),
    comment="Events on their way to webhooks, written with the event; kept for some days.",
)

answers = Table(
    "answers",
    metadata,
    Column("tenant", Text, primary_key=True, comment="Whose key it is."),
    Column("key", Text, primary_key=True, comment="The idempotency key as the client gave it."),
    Column("holder", Uuid, nullable=False, comment="Who answers it; changed by who takes it over from one that died."),
    _time(
        "seen_at",
        "Last sign of the holder, renewed while it is at work; set a last time with the answer.",
        nullable=False,
        server_default=func.now(),
    ),
    Column("status", SmallInteger, comment="HTTP status of the answer; set once; NULL: still at work."),
    Column("fingerprint", Text, comment="SHA-256 in hex of what was asked; set with status."),
    Column("headers", JSONB, comment="Of the answer, in pairs; set with status."),
    Column("body", LargeBinary, comment="Of the answer; set with status; NULL: it is not kept."),
    Index("answers_seen", "seen_at"),
    comment="Answers to POSTs that carried an idempotency key; kept for some days.",
)
