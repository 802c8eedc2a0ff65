"""The farm from other people's Python: typed, and over HTTP alone. ``Client`` waits, ``AsyncClient`` is awaited.

    with Client() as farm:
        batch = farm.submit_many("banners", [{"prompt": 'a banner that says "SALE"', "width": 728, "height": 90}])
        batch = farm.wait(batch)
        for job in farm.batch_jobs(batch):
            Path(job.file_name).write_bytes(farm.download(job))

Everything is asked again a few times when the farm is away for a moment or the connection is lost. Every POST carries
an idempotency key, by which the farm knows what it has done already: nothing is done twice.

Both clients are one code path: ``_async`` is written by hand, ``make client`` makes ``_sync`` of it.
"""

from producer.client._async.client import AsyncClient
from producer.client._sync.client import Client
from producer.client.bodies import ManifestOptions, Request
from producer.client.errors import (
    ClientError,
    Corrupt,
    Forbidden,
    NotDone,
    NotFound,
    Overloaded,
    Refused,
    ServerError,
    Unauthorized,
    Unreachable,
)
from producer.client.models import (
    Batch,
    BatchState,
    ClaimRecord,
    Delivery,
    Estimate,
    Event,
    Farm,
    Fault,
    Job,
    Key,
    ManifestKind,
    NamedSize,
    Preview,
    Priority,
    Problem,
    Rejection,
    ResultsFormat,
    RetriedState,
    Scope,
    Sort,
    State,
    Tenant,
    TenantChanges,
    Webhook,
    WebhookKind,
    Worker,
)

__all__ = [
    "AsyncClient",
    "Batch",
    "BatchState",
    "ClaimRecord",
    "Client",
    "ClientError",
    "Corrupt",
    "Delivery",
    "Estimate",
    "Event",
    "Farm",
    "Fault",
    "Forbidden",
    "Job",
    "Key",
    "ManifestKind",
    "ManifestOptions",
    "NamedSize",
    "NotDone",
    "NotFound",
    "Overloaded",
    "Preview",
    "Priority",
    "Problem",
    "Refused",
    "Rejection",
    "Request",
    "ResultsFormat",
    "RetriedState",
    "Scope",
    "ServerError",
    "Sort",
    "State",
    "Tenant",
    "TenantChanges",
    "Unauthorized",
    "Unreachable",
    "Webhook",
    "WebhookKind",
    "Worker",
]
