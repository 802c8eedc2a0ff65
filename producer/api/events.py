"""The paths of events: what becomes of a job or a batch, told while it happens, as server-sent events.

One reader a process asks Postgres for all streams at once (``Feed``); a stream itself costs no thread and no
connection. One that does not take what it is told is not read for until it does, so a slow receiver fills no memory.
"""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import AfterValidator
from starlette.responses import StreamingResponse

from producer.api.answers import PREFIX
from producer.api.documents import problems
from producer.api.errors import Fault, Forbidden, Invalid, Unauthorized
from producer.api.services import Here, Services
from producer.jobs.contract import EventKind, Scope, State
from producer.jobs.errors import Unavailable
from producer.jobs.events import Cursor, Event, Events, News, Progress, Target
from producer.jobs.settings import Durations

log = logging.getLogger(__name__)

LAST_EVENT_ID = "Last-Event-ID"
BEAT = b": \n\n"
"""A comment, which receivers pass over."""
JOB_ENDS = {EventKind.of_state(state) for state in State if state.terminal}

router = APIRouter(prefix=PREFIX, tags=["events"])


def _id_of_an_event(written: str) -> str:
    Cursor.parse(written)
    return written


LastEventId = Annotated[
    Annotated[str, AfterValidator(_id_of_an_event)] | None,
    Header(alias=LAST_EVENT_ID, description="The id of the last event that arrived: go on behind it."),
]


class EventStream(StreamingResponse):
    """Server-sent events, as no cache and no proxy should hold them back."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


@router.get("/jobs/{job_id}/events", status_code=200, response_class=EventStream, responses=problems(404))
def job_events(job_id: UUID, request: Request, here: Here, last_event_id: LastEventId = None) -> EventStream:
    """What becomes of the job, as server-sent events: its states, the steps that are done, its previews.

    Everything from its beginning is told, or from ``Last-Event-ID`` on. The stream ends when the job has.
    """
    job = here.store.job(job_id)
    target, cursor = Target(job_id=job_id), _cursor(here, last_event_id)
    data = {"state": job.state, "name": job.name, "error_code": job.error_code}
    known = {name: value for name, value in data.items() if value is not None}
    kind = EventKind.of_state(job.state)
    last = Event(kind, job.finished_at, job.batch_id, job_id, known, cursor)
    return EventStream(_told(request, here, target, cursor or Cursor(), last if kind in JOB_ENDS else None))


@router.get("/batches/{batch_id}/events", status_code=200, response_class=EventStream, responses=problems(404))
def batch_events(batch_id: UUID, request: Request, here: Here, last_event_id: LastEventId = None) -> EventStream:
    """What becomes of the batch and each of its jobs, as server-sent events.

    Everything from its beginning is told, or from ``Last-Event-ID`` on. The stream ends with ``batch.finished``.
    """
    batch = here.store.batch(batch_id)
    target, cursor = Target(batch_id=batch_id), _cursor(here, last_event_id)
    data = {"name": batch.name, "jobs": batch.jobs, "rejected": batch.rejected, "counts": batch.counts}
    last = Event(EventKind.BATCH_FINISHED, batch.finished_at, batch_id, None, data, cursor)
    return EventStream(_told(request, here, target, cursor or Cursor(), last if batch.finished_at else None))


def _cursor(here: Services, last_event_id: str | None) -> Cursor | None:
    """Raises: Invalid: it was told by another farm, or by this one before its database was restored."""
    if last_event_id is None:
        return None
    cursor = Cursor.parse(last_event_id)
    if Events(here.database).ahead(cursor):
        raise Invalid([Fault(field=LAST_EVENT_ID, message="is ahead of all that this farm has told")])
    return cursor


async def _told(
    request: Request, here: Services, target: Target, cursor: Cursor, last: Event | None
) -> AsyncIterator[bytes]:
    """The stream. ``last``: how it ends if there is nothing to tell, because all was over when it began."""
    feed: Feed = request.app.state.feed
    beat_s, clock = here.settings.durations.stream_beat_s, asyncio.get_running_loop().time
    checked_at = clock()
    with feed.following(target, cursor) as follower:
        while not feed.closed:
            news = await follower.next(beat_s)
            for event in news.events if news else ():
                yield written(event)
            if news is None:
                yield BEAT
            elif ending := _ending(target, news, last):
                if ending is last:
                    yield written(last)
                return
            else:
                last = None
            if clock() - checked_at >= beat_s:
                if not await run_in_threadpool(_may_go_on, request, here, target):
                    return
                checked_at = clock()


def _ending(target: Target, news: News, last: Event | None) -> Event | None:
    """The event with which a stream ends, if these news, or that there are none, are its end."""
    stored = [event for event in news.events if event.cursor]
    latest = stored[-1] if stored else last
    ends = {EventKind.BATCH_FINISHED} if target.batch_id else JOB_ENDS
    return latest if latest and latest.kind in ends and not news.more else None


def _may_go_on(request: Request, here: Services, target: Target) -> bool:
    """Whether the key still opens this, and what it is about is still there. Nobody knows: it goes on."""
    try:
        here.access.caller(request, paced=False).need(Scope.READ)
        return Events(here.database).exists(target)
    except (Unauthorized, Forbidden):
        return False
    except Unavailable:
        return True


def written(event: Event) -> bytes:
    """The event as it goes over the wire."""
    data = {
        "kind": event.kind,
        "at": event.at.isoformat() if event.at else None,
        "job_id": str(event.job_id) if event.job_id else None,
        "batch_id": str(event.batch_id) if event.batch_id else None,
        **event.data,
    }
    id = f"id: {event.cursor}\n" if event.cursor else ""
    return f"{id}event: {event.kind}\ndata: {json.dumps(data)}\n\n".encode()


class Follower:
    """One stream's place. Its methods are the event loop's alone."""

    def __init__(self, target: Target, cursor: Cursor, wake: asyncio.Event) -> None:
        self.target = target
        self.cursor = cursor
        self._wake = wake
        self._news: News | None = None
        self._arrived = asyncio.Event()
        self._silent = False
        self._drawing: Mapping[UUID, Progress] = {}

    @property
    def hungry(self) -> bool:
        """Whether it has taken what it was given."""
        return self._news is None

    def give(self, news: News, drawing: Sequence[Progress]) -> None:
        """What was found for it. The first time it is told even of nothing."""
        fresh = [_progressed(progress) for progress in drawing if self._drawing.get(progress.job_id) != progress]
        self._drawing = {progress.job_id: progress for progress in drawing}
        self.cursor = news.cursor
        if news.events or fresh or not self._silent:
            self._silent = True
            self._news = News([*news.events, *fresh], news.cursor, news.more)
            self._arrived.set()

    def end(self) -> None:
        """Nothing more will come."""
        self._arrived.set()

    async def next(self, timeout_s: float) -> News | None:
        """What is new; None if nothing is for ``timeout_s``, or ever again."""
        if self.hungry:
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout_s)
            except TimeoutError:
                return None
        news, self._news = self._news, None
        self._arrived.clear()
        if news is not None and news.more:
            self._wake.set()
        return news


def _progressed(progress: Progress) -> Event:
    data = {"state": State.RUNNING, "step": progress.step, "steps": progress.steps, "preview_url": None}
    if progress.preview_key is not None:
        data["preview_url"] = f"{PREFIX}/jobs/{progress.job_id}/preview"
    return Event(EventKind.JOB_PROGRESS, progress.at, progress.batch_id, progress.job_id, data)


class Feed:
    """Reads for all streams of this process while there are any. Its methods are the event loop's alone."""

    def __init__(self, events: Events, durations: Durations) -> None:
        self.closed = False
        self._events = events
        self._durations = durations
        self._followers: set[Follower] = set()
        self._wake = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._missing = False

    @contextmanager
    def following(self, target: Target, cursor: Cursor) -> Iterator[Follower]:
        """A follower of ``target``, from ``cursor`` on, that is read for while the body runs."""
        follower = Follower(target, cursor, self._wake)
        self._followers.add(follower)
        self._wake.set()
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_on())
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    def close(self) -> None:
        """End all streams, so that the server need not wait for them."""
        self.closed = True
        for follower in self._followers:
            follower.end()

    async def _read_on(self) -> None:
        while self._followers and not self.closed:
            self._wake.clear()
            try:
                await self._read_once()
            except Unavailable as error:
                self._note_missing(error)
            except Exception:  # the streams would be silent for ever: say what happened, and go on
                log.exception("events could not be read")
            await self._rest()

    async def _rest(self) -> None:
        """Until the next look is due, or somebody wants one; a few that want one at the same moment share it."""
        try:
            await asyncio.wait_for(self._wake.wait(), self._durations.stream_s)
        except TimeoutError:
            return
        await asyncio.sleep(self._durations.stream_s / 20)

    async def _read_once(self) -> None:
        """Streams that follow the same from the same place are read for as one."""
        waiting: dict[tuple[Target, str], list[Follower]] = defaultdict(list)
        for follower in self._followers:
            if follower.hungry:
                waiting[follower.target, str(follower.cursor)].append(follower)
        groups = list(waiting.values())
        asked = [(followers[0].target, followers[0].cursor) for followers in groups]
        found, drawing = await run_in_threadpool(self._read, asked)
        for followers, news in zip(groups, found, strict=True):
            for follower in followers:
                follower.give(news, drawing.get(follower.target, ()))
        self._missing = False

    def _read(self, asked: Sequence[tuple[Target, Cursor]]) -> tuple[list[News], dict[Target, list[Progress]]]:
        """The progress last: whoever is drawn then had not ended in what was read before."""
        found = self._events.read(asked)
        drawing: dict[Target, list[Progress]] = defaultdict(list)
        targets = {target for target, _ in asked}
        for progress in self._events.progress(targets, lease_s=self._durations.lease_s):
            drawing[Target(job_id=progress.job_id)].append(progress)
            drawing[Target(batch_id=progress.batch_id)].append(progress)
        return found, drawing

    def _note_missing(self, error: Unavailable) -> None:
        if not self._missing:
            log.warning("streams of events wait for %s", error)
        self._missing = True
