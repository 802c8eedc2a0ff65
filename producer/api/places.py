"""Places for what takes long, so that it never takes all threads of this process, or all connections to Postgres.

Most requests need a thread and a connection for milliseconds, and share some forty of the one and
``services.CONNECTIONS`` of the other. A bulk submission needs both for minutes, and a download needs a thread whenever
the bucket is slow. So these run in threads of their own, as many at once as there are places. Whoever finds none waits
in line with neither, and is told at last to ask again.

Invariant: what runs in a place waits for no other place.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import anyio.to_thread

from producer.api.errors import Busy

WAIT_S = 60.0
"""In line. A caller who has just sent a large body waits rather than send it again."""

P = ParamSpec("P")
T = TypeVar("T")


class Places:
    """So many of them. The event loop's alone, and one process's."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._threads = anyio.CapacityLimiter(count)

    async def begin(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``work`` returns. Raises: Busy: no place was free for ``WAIT_S``, and nothing was done."""
        try:
            async with asyncio.timeout(WAIT_S):
                await self._free.acquire()
        except TimeoutError:
            raise Busy from None
        return await self._run(partial(work, *args, **kwargs))

    async def go_on(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for the next short piece of what has begun: waits as long as it must."""
        await self._free.acquire()
        return await self._run(partial(work, *args, **kwargs))

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._threads)
        finally:
            self._free.release()
