"""The client as a whole: its parts by noun, and what concerns jobs and batches alike."""

import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import httpx

from producer.client._async.access import AsyncAccess
from producer.client._async.batches import AsyncBatches
from producer.client._async.jobs import AsyncJobs
from producer.client._async.webhooks import AsyncWebhooks
from producer.client.errors import NotDone
from producer.client.frames import BATCH_ENDS, JOB_ENDS, Frames
from producer.client.models import Batch, Event, Farm, Job
from producer.client.waiting import pause_async

SILENCE_S = 60.0
"""A stream of events that says nothing for so long, not even that it is alive, is asked for anew."""

Waited = TypeVar("Waited", Job, Batch)


class AsyncClient(AsyncJobs, AsyncBatches, AsyncAccess, AsyncWebhooks):
    """The farm at ``base_url``, by whose leave (``api_key``) it may be asked. One connection pool.

    To be closed, or used as a context. ``timeout_s`` limits each wait for the farm, not what is asked as a whole.
    """

    async def farm(self) -> Farm:
        """Counts, backlog and workers. Raises: ClientError."""
        return await self._asked(Farm, "GET", "farm")

    async def wait(
        self,
        what: Waited,
        *,
        poll_s: float = 1.0,
        timeout_s: float | None = None,
        progress: Callable[[Waited], object] = lambda _: None,
    ) -> Waited:
        """The job or batch once it is done, however it ended; ``progress`` is called with each look at it.

        Raises:
            NotDone: it was not within ``timeout_s``.
            ClientError
        """
        began = time.monotonic()
        while True:
            what = await self._seen(what)
            progress(what)
            if what.done:
                return what
            if timeout_s is not None and time.monotonic() - began + poll_s > timeout_s:
                raise NotDone(what, timeout_s)
            await pause_async(poll_s)

    async def stream(self, what: Waited) -> AsyncIterator[Event]:
        """What becomes of it, from its submission, as it happens, until it is done.

        A lost connection is taken up again where it broke: no event that the farm keeps is missed or told twice.

        Raises: NotFound, ClientError.
        """
        noun, ends = ("jobs", JOB_ENDS) if isinstance(what, Job) else ("batches", BATCH_ENDS)
        path, frames = f"{noun}/{what.id}/events", Frames(ends)
        while True:
            response = await self._answer("GET", path, headers=frames.headers(), stream=True, patience_s=SILENCE_S)
            whole = True
            try:
                async for line in response.aiter_lines():
                    if (event := frames.fed(line)) is not None:
                        yield event
            except httpx.HTTPError:
                whole = False
            finally:
                await response.aclose()
            if whole and (frames.ended or (await self._seen(what)).done):
                return
            await pause_async(frames.wait_s)

    async def _seen(self, what: Waited) -> Waited:
        return await self.job(what) if isinstance(what, Job) else await self.batch(what)
