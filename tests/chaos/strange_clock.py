"""A process on a host whose clock is off: everything that it ever asks for the time is told another.

A real clock is everybody's and may be set by root alone, so Python's own sources are replaced, before anything that
reads them is imported: such a member is never forked, but started. What C code asks the kernel itself stays right.
"""

import datetime
import functools
import time
from collections.abc import Callable
from typing import Any


def begin(ahead_s: float, role: str, environment: dict[str, str], log_path: str) -> None:
    """In the new process: shift its clock, then become the member."""
    shift(ahead_s)
    from tests.chaos import nursery

    nursery.begin(role, environment, log_path)


def shift(ahead_s: float) -> None:
    """From now on this process believes to live ``ahead_s`` seconds later."""
    time_, time_ns = time.time, time.time_ns
    time.time = lambda: time_() + ahead_s
    time.time_ns = lambda: time_ns() + int(ahead_s * 1e9)
    # No plain functions: logging keeps the one it uses in a class, which would make a method of it.
    time.gmtime = functools.partial(_convert, time.gmtime)
    time.localtime = functools.partial(_convert, time.localtime)
    datetime.datetime = _shifted(datetime.timedelta(seconds=ahead_s))  # type: ignore[misc]


def _convert(convert: Callable[[float], time.struct_time], seconds: float | None = None) -> time.struct_time:
    return convert(time.time() if seconds is None else seconds)


def _shifted(ahead: datetime.timedelta) -> type[datetime.datetime]:
    real = datetime.datetime

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, real)

    class Shifted(real, metaclass=Meta):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return real.now(tz) + ahead

        @classmethod
        def utcnow(cls) -> Any:
            return real.now(datetime.UTC).replace(tzinfo=None) + ahead

        @classmethod
        def today(cls) -> Any:
            return real.now() + ahead  # which is what it gives

    return Shifted
