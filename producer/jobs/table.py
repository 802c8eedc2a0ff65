"""The SQLAlchemy tables. Each column says when it changes and who changes it.

Times are the database's clock. Statements are in ``store``; the schema's history is in ``migrations/``; the test
``tests/migration`` holds the two together.

No index names a column that changes often, or an update would not be HOT; the state is the exception, in ``jobs_lane``
and ``jobs_finished`` (``not_before`` changes only together with it).
"""

from uuid import UUID

from sqlalchemy import (
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
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

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
        "paused",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Changed by a person; no job of a paused batch is claimed.",
    ),
    _time("created_at", "Submission; never changes.", nullable=False, server_default=func.now()),
    Index("batches_created", "created_at"),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", Text, primary_key=True, comment="Never changes."),
    Column("weight", Double, nullable=False, comment="Of its share beside other tenants; changed by a person."),
    comment="Tenants whose weight is not 1: others need no row.",
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
    Column("name", Text, comment="Name of the output without suffix; never changes."),
    Column(
        "priority",
        SmallInteger,
        nullable=False,
        comment="Rank of contract.Priority, 0 goes first; given at submission.",
    ),
    Column("tenant", Text, nullable=False, comment="Whose job it is; never changes."),
    Column(
        "lane_id",
        BigInteger,
        nullable=False,
        comment="In lanes; never changes. No foreign key: it would be looked up for each row of a bulk submission.",
    ),
    Column(
        "work",
        Double,
        nullable=False,
        comment="Megapixel-steps (ImageRequest.work): what fairness counts; never changes.",
    ),
    Column("request", JSONB, nullable=False, comment="pipeline.request.ImageRequest with its seed; never changes."),
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
    Index("jobs_finished", "state", "finished_at"),
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

submissions = Table(
    "submissions",
    metadata,
    Column("tenant", Text, primary_key=True, comment="Whose key it is."),
    Column("key", Text, primary_key=True, comment="The idempotency key as the client gave it."),
    Column("fingerprint", Text, nullable=False, comment="SHA-256 in hex of what was submitted with it."),
    Column(
        "job_id",
        Uuid,
        ForeignKey("jobs.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        comment="What came of it, or",
    ),
    Column(
        "batch_id",
        Uuid,
        ForeignKey("batches.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        comment="what came of it.",
    ),
    _time("created_at", "Submission.", nullable=False, server_default=func.now()),
    Index("submissions_job", "job_id"),
    Index("submissions_batch", "batch_id"),
    comment="One row per idempotency key, written in the submitting transaction; kept as long as what came of it.",
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
