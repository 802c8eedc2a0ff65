# Written by `make client` from producer/client/_async/batches.py: change that one.
"""Batches: submit many, look before, steer, and fetch what came of them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Unpack
from uuid import UUID

from producer.client._sync.transport import Answered, Pieces, Transport, rewindable, spooled
from producer.client.bodies import (
    NDJSON,
    ManifestOptions,
    Request,
    document,
    given,
    id_of,
    lines_of,
    media_type_of,
    named,
    query_of,
)
from producer.client.models import (
    Batch,
    BatchState,
    Estimate,
    Job,
    ManifestKind,
    NamedSize,
    Preview,
    Priority,
    Rejection,
    ResultsFormat,
    RetriedState,
    State,
)
from producer.client.waiting import aside

SUBMISSION_TIMEOUT_S = 900.0
"""A file of 200,000 rows is answered once all of them are in the table; what changes them all takes as long."""


class Batches(Transport):
    """The client's half that knows batches."""

    def submit_many(
        self,
        name: str,
        requests: Iterable[Request],
        *,
        tenant: str | None = None,
        weight: float | None = None,
        key: str | None = None,
        deduplicate: bool = False,
        previews: int | None = None,
    ) -> Batch:
        """Submit a batch of any length: all or nothing. ``requests`` is read once, in constant memory.

        What ``requests`` itself raises passes on, and nothing is submitted.

        Args:
            tenant: whose batch it is; None: the API key's own tenant.
            weight: of its share beside the tenant's other batches, 0.01 to 100; None: 1.
            key: as for ``submit``.
            deduplicate: what was drawn already is not drawn again; such jobs have succeeded at once, and are the
                ``counts["succeeded"]`` of the answer. With the key of an earlier call what was drawn since counts too.
            previews: of each image, as for ``submit``.

        Raises:
            Refused: lines are wrong: ``problem.errors`` names each line (from 1) and field. Or the key came before
                with other lines, another name or weight.
            ClientError
        """
        params = given(
            name=name,
            tenant=tenant,
            weight=weight,
            deduplicate="true" if deduplicate else None,
            previews=previews,
        )
        with spooled() as spool:
            aside(spool.writelines, lines_of(requests))
            spool.seek(0)
            return self._uploaded(Batch, "batches", NDJSON, Pieces(spool), params, key)

    def submit_manifest(
        self,
        file: Path | str | IO[bytes],
        *,
        kind: ManifestKind | None = None,
        key: str | None = None,
        **options: Unpack[ManifestOptions],
    ) -> Batch:
        """Submit a spreadsheet or a file of lines: all rows or none, or with ``partial`` the good ones.

        The file is sent in constant memory, and read by the farm.

        Args:
            file: its path, or open in binary mode; a pipe goes by way of a temporary file.
            kind: None: as the file's name ends.
            key: as for ``submit``.
            options: see ``ManifestOptions``.

        Raises:
            Refused: rows are wrong: ``problem.errors`` names each line (from 1, the header included) and column.
            ValueError: the file's kind is not known.
            OSError: the file cannot be read.
            ClientError
        """
        return self._manifest(Batch, "batches", file, kind, key, options)

    def preview_manifest(
        self, file: Path | str | IO[bytes], *, kind: ManifestKind | None = None, **options: Unpack[ManifestOptions]
    ) -> Preview:
        """What ``submit_manifest`` would submit: the first rows, counts, problems, the cost. Submits nothing.

        Raises: as ``submit_manifest``.
        """
        return self._manifest(Preview, "manifests/preview", file, kind, None, options)

    def estimate(self, work: float) -> Estimate:
        """What so much ``work``, in megapixel-steps, costs. Raises: ClientError."""
        return self._asked(Estimate, "GET", "estimate", params={"work": work})

    def sizes(self) -> list[NamedSize]:
        """The sizes that have a name, which ``vary`` and ``default`` understand. Raises: ClientError."""
        return self._listed(NamedSize, "sizes", "sizes")

    def batch(self, batch: Batch | UUID | str) -> Batch:
        """The batch as it is now. Raises: NotFound, ClientError."""
        return self._asked(Batch, "GET", f"batches/{id_of(batch)}")

    def batches(
        self, *, state: BatchState | None = None, tenant: str | None = None, name: str | None = None, page: int = 100
    ) -> Iterator[Batch]:
        """All batches, the newest first, asked for page by page.

        Args:
            name: text that the name holds.
            page: batches a page, 1 to 100.

        Raises:
            ClientError
        """
        params = given(state=state, tenant=tenant, name=name, limit=page)
        return self._pages(Batch, "batches", "batches", "cursor", params)

    def batch_jobs(self, batch: Batch | UUID | str, *, state: State | None = None, page: int = 500) -> Iterator[Job]:
        """The batch's jobs in the order of submission, page by page. Raises: NotFound, ClientError."""
        return self._pages(Job, "jobs", f"batches/{id_of(batch)}/jobs", "after", given(state=state, limit=page))

    def rejections(self, batch: Batch | UUID | str, *, page: int = 500) -> Iterator[Rejection]:
        """The lines of the batch's input that became no job, page by page. Raises: NotFound, ClientError."""
        return self._pages(Rejection, "rejections", f"batches/{id_of(batch)}/rejections", "after", given(limit=page))

    def cancel_batch(self, batch: Batch | UUID | str) -> Batch:
        """Cancel all of a batch that has not ended; images that are there stay. Raises: NotFound, ClientError."""
        return self._ordered(batch, "cancel", patience_s=SUBMISSION_TIMEOUT_S)

    def retry_batch(self, batch: Batch | UUID | str, states: Sequence[RetriedState] = ("failed",)) -> Batch:
        """Draw again what of the batch is in these ``states``. Raises: NotFound, ClientError."""
        return self._ordered(batch, "retry", {"state": list(states)}, patience_s=SUBMISSION_TIMEOUT_S)

    def pause(self, batch: Batch | UUID | str) -> Batch:
        """Start nothing more of the batch; what is being drawn is finished. Raises: NotFound, ClientError."""
        return self._ordered(batch, "pause")

    def resume(self, batch: Batch | UUID | str) -> Batch:
        """Go on with a paused batch. Raises: NotFound, ClientError."""
        return self._ordered(batch, "resume")

    def prioritise(self, batch: Batch | UUID | str, priority: Priority) -> Batch:
        """Let what of the batch waits go first or later. Raises: NotFound, ClientError."""
        path = f"batches/{id_of(batch)}/priority"
        body = document({"priority": priority})
        return self._asked(Batch, "PUT", path, patience_s=SUBMISSION_TIMEOUT_S, **body)

    def delete_batch(self, batch: Batch | UUID | str) -> None:
        """Remove a batch with its jobs and images. Raises: NotFound, ClientError."""
        self._removed(f"batches/{id_of(batch)}")

    def write_results(self, batch: Batch | UUID | str, to: Path | str, format: ResultsFormat = "csv") -> None:
        """Write what became of each row of the input to the file ``to``.

        Raises:
            OSError: the file cannot be written; nothing of it is left.
            NotFound, ClientError
        """
        self._written(f"batches/{id_of(batch)}/results", to, {"format": format})

    def write_images(self, batch: Batch | UUID | str, to: Path | str) -> None:
        """Write all images that are there to the ZIP file ``to``. Raises: as ``write_results``."""
        self._written(f"batches/{id_of(batch)}/images.zip", to, {})

    def _ordered(
        self,
        batch: Batch | UUID | str,
        order: str,
        params: dict[str, Any] | None = None,
        *,
        patience_s: float | None = None,
    ) -> Batch:
        path = f"batches/{id_of(batch)}/{order}"
        return self._asked(Batch, "POST", path, params=params, patience_s=patience_s)

    def _manifest(
        self,
        model: type[Answered],
        path: str,
        file: Path | str | IO[bytes],
        kind: ManifestKind | None,
        key: str | None,
        options: ManifestOptions,
    ) -> Answered:
        if isinstance(file, Path | str):
            with Path(file).open("rb") as opened:
                return self._manifest(model, path, opened, kind, key, options)
        media_type, query = media_type_of(named(file), kind), query_of(named(file), options)
        with spooled() as spool:
            return self._uploaded(model, path, media_type, rewindable(file, spool), query, key)

    def _uploaded(
        self,
        model: type[Answered],
        path: str,
        media_type: str,
        body: Pieces,
        params: dict[str, Any],
        key: str | None,
    ) -> Answered:
        return self._asked(
            model,
            "POST",
            path,
            params=params,
            headers={"Content-Type": media_type},
            content=body,
            key=key,
            patience_s=SUBMISSION_TIMEOUT_S,
        )
