"""Waits for jobs without a thread for each: one question to the store for all that anybody waits for, again and again.

It asks while somebody waits. Whatever goes wrong, it asks again; whoever waits has a limit of its own.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

from fastapi.concurrency import run_in_threadpool

from producer.jobs.contract import Standing
from producer.jobs.errors import NotFound

log = logging.getLogger(__name__)

Look = Callable[[Sequence[UUID]], dict[UUID, Standing]]


class Seat:
    """Somebody who waits for one job."""

    def __init__(self, job_id: UUID) -> None:
        self.job_id = job_id
        self._told: list[Standing | None] = []
        self._news: asyncio.Queue[Standing | None] = asyncio.Queue()

    async def change(self, timeout_s: float | None = None) -> Standing:
        """Where the job stands: now at first, then each time that it is seen to have changed.

        Raises:
            TimeoutError: it has not changed for ``timeout_s``.
            NotFound
        """
        standing = await asyncio.wait_for(self._news.get(), timeout_s)
        if standing is None:
            raise NotFound("job", self.job_id)
        return standing

    def tell(self, standing: Standing | None) -> None:
        """Where the job is, None if there is none; repetitions are kept from whoever waits."""
        if self._told != [standing]:
            self._told = [standing]
            self._news.put_nowait(standing)


class Waiting:
    """All who wait in one process, which has one event loop."""

    def __init__(self, look: Look, pause_s: float) -> None:
        self._look = look
        self._pause_s = pause_s
        self._seats: set[Seat] = set()
        self._asking: asyncio.Task[None] | None = None
        self._missing = False

    @contextmanager
    def seat(self, job_id: UUID) -> Iterator[Seat]:
        """While it is held, somebody asks for this job."""
        seat = Seat(job_id)
        self._seats.add(seat)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        try:
            yield seat
        finally:
            self._seats.remove(seat)

    async def ended(self, job_ids: Sequence[UUID]) -> None:
        """Return when all of these have ended. Raises: NotFound."""
        for job_id in job_ids:
            with self.seat(job_id) as seat:
                while not (await seat.change()).state.terminal:
                    pass

    async def _ask(self) -> None:
        try:
            while self._seats:
                await self._tell()
                await asyncio.sleep(self._pause_s)
        finally:
            self._asking = None

    async def _tell(self) -> None:
        seats = list(self._seats)
        try:
            found = await run_in_threadpool(self._look, [seat.job_id for seat in seats])
        except Exception as error:  # if this ended, nobody would be told anything any more: say so once, and go on
            if not self._missing:
                log.warning("requests wait for images longer: %s", error, exc_info=True)
            self._missing = True
            return
        self._missing = False
        for seat in seats:
            seat.tell(found.get(seat.job_id))
