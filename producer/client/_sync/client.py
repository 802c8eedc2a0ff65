# Written by `make client` from producer/client/_async/client.py: change that one.
"""The client as a whole: its parts by noun, and what concerns jobs and batches alike."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx

from producer.client._sync.access import Access
from producer.client._sync.batches import Batches
from producer.client._sync.jobs import Jobs
from producer.client._sync.webhooks import Webhooks
from producer.client.errors import NotDone
from producer.client.frames import BATCH_ENDS, JOB_ENDS, Frames
from producer.client.models import Batch, Event, Farm, Job
from producer.client.waiting import pause

SILENCE_S = 60.0
"""A stream of events that says nothing for so long, not even that it is alive, is asked for anew."""

Waited = TypeVar("Waited", Job, Batch)


class Client(Jobs, Batches, Access, Webhooks):
    """The farm at ``base_url``, by whose leave (``api_key``) it may be asked. One connection pool.

    To be closed, or used as a context. ``timeout_s`` limits each wait for the farm, not what is asked as a whole.
    """

    def farm(self) -> Farm:
        """Counts, backlog and workers. Raises: ClientError."""
        return self._asked(Farm, "GET", "farm")

    def wait(
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
            what = self._seen(what)
            progress(what)
            if what.done:
                return what
            if timeout_s is not None and time.monotonic() - began + poll_s > timeout_s:
                raise NotDone(what, timeout_s)
            pause(poll_s)

    def stream(self, what: Waited) -> Iterator[Event]:
        """What becomes of it, from its submission, as it happens, until it is done.

        A lost connection is taken up again where it broke: no event that the farm keeps is missed or told twice.

        Raises: NotFound, ClientError.
        """
        noun, ends = ("jobs", JOB_ENDS) if isinstance(what, Job) else ("batches", BATCH_ENDS)
        path, frames = f"{noun}/{what.id}/events", Frames(ends)
        while True:
            response = self._answer("GET", path, headers=frames.headers(), stream=True, patience_s=SILENCE_S)
            whole = True
            try:
                for line in response.iter_lines():
                    if (event := frames.fed(line)) is not None:
                        yield event
            except httpx.HTTPError:
                whole = False
            finally:
                response.close()
            if whole and (frames.ended or (self._seen(what)).done):
                return
            pause(frames.wait_s)

    def _seen(self, what: Waited) -> Waited:
        return self.job(what) if isinstance(what, Job) else self.batch(what)
