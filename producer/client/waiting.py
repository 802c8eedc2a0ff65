"""The two things that cannot be written once for both clients: to pause, and to leave a blocking call to others.

``_async`` uses the first of each pair; in ``_sync``, which is made of it, stands the second.
"""

import asyncio
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def pause_async(seconds: float) -> None:
    await asyncio.sleep(seconds)


def pause(seconds: float) -> None:
    time.sleep(seconds)


async def aside_async(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it in a thread: it reads or writes a file."""
    return await asyncio.to_thread(function, *args, **kwargs)


def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return function(*args, **kwargs)
