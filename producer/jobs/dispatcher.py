"""Moves job ids from Postgres to Redis, and puts back what Redis lost. It alone publishes.

Redis holds only a small window: what the workers have free places for, and what will be free before the next look but
one. So Redis stays small however long the backlog is; who goes next is decided late, in a fair order (``fairness``),
and whoever comes finds next to nothing before it that was decided without it; a cancelled job never leaves the table;
and what Redis should hold (the table ``messages``) can be compared with what it does hold. From a full window urgent
messages are still taken first, since each priority has a list of its own; and if the next in turn is more urgent than
all of them, it is let in nevertheless.

Several dispatchers may run, one in every API process and others as a role of their own; one leads, by a row with an
expiry on the database's clock. Each turn notes its messages in Postgres first and publishes then: dying in between
leaves an overdue message, which the audit publishes again. A message that is published twice costs nothing, because
a claim succeeds only once. A leader that was frozen and wakes up changes nothing: each of its statements asks whether
it still leads.
"""

import logging
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from uuid import UUID, uuid4

from producer.jobs import schema
from producer.jobs.contract import Lane, Next, Priority, Window
from producer.jobs.errors import SchemaMismatch, Unavailable
from producer.jobs.fairness import FairOrder
from producer.jobs.limits import room_to_draw
from producer.jobs.queue import Queue
from producer.jobs.settings import Durations
from producer.jobs.store import Store
from producer.jobs.store.leading import Listener

log = logging.getLogger(__name__)

REACHES = (0, 100, 1_000, 10_000, 10_000, 10_000)
"""How many turns behind those in the room each round looks for jobs: hundreds of lanes may hold only delayed ones. What
is not filled after the last round is filled in the next turn."""
MOST_WAITING = 20_000
"""A queue that is longer than any window can be holds what nobody asked for."""
WRONG_TYPE = "WRONGTYPE"
"""Redis's word for a key that is of another type than the command is for."""


@dataclass
class Counts:
    """What one dispatcher has done since it began, in jobs."""

    published: int = 0
    republished: int = 0
    reclaimed: int = 0


class Dispatcher:
    """One dispatcher. ``run`` it in a thread or process of its own."""

    def __init__(self, store: Store, queue: Queue, durations: Durations) -> None:
        self.id: UUID = uuid4()
        self.leading = False
        self.counts = Counts()
        self._store = store
        self._queue = queue
        self._durations = durations
        self._order = FairOrder()
        self._throughput = Throughput()
        self._renewed_at = -math.inf
        self._renew_at = 0.0
        self._audit_at = 0.0
        self._reopen_at = 0.0
        self._finish_at = 0.0
        self._losses = Losses(durations)
        self._connected_since = 0.0
        self._missing: str | None = None

    def run(self, stop: threading.Event) -> None:
        """Take turns until ``stop`` is set; a missing Postgres or Redis is waited for, and said once.

        Raises:
            SchemaMismatch: the database was migrated to a schema that this code was not written for.
        """
        while not stop.is_set():
            self._run_until_trouble(stop)
            stop.wait(self._durations.renew_s)
        self._resign()

    def _run_until_trouble(self, stop: threading.Event) -> None:
        try:
            with self._store.listening() as listener:
                self._take_turns(listener, stop)
        except SchemaMismatch:
            self.leading = False  # the post expires by itself
            raise
        except Unavailable as error:
            self._note_missing(error)
        except Exception:  # the farm stands still without a dispatcher: say what happened, and go on
            log.exception("a turn of the dispatcher failed")

    def _take_turns(self, listener: Listener, stop: threading.Event) -> None:
        while not stop.is_set():
            self.turn()
            if listener.wait(self._durations.top_up_s):
                stop.wait(self._durations.top_up_s / 20)  # several commits in a row are one turn

    def turn(self) -> None:
        """Renew the post when it is due; as the leader, reclaim, audit, and fill the window.

        Raises: Unavailable, SchemaMismatch.
        """
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew(now)
        if self.leading:
            self._audit(now)
            self._top_up()

    def _renew(self, now: float) -> None:
        if now - self._renewed_at > self._durations.lease_s / 2:
            # Postgres was away, or this process frozen, for so long that heartbeats may be stale by no worker's fault.
            self._connected_since = now
        schema.compare(self._store.schema_revision())
        led = self.leading
        self.leading = self._store.lead(self.id, leader_s=self._durations.leader_s)
        self._renewed_at = now
        # Who stands by asks twice as often, to lead within 5 s of the leader's end.
        self._renew_at = now + self._durations.renew_s / (1 if self.leading else 2)
        if self.leading != led:
            log.info("dispatcher %s %s", self.id, "leads" if self.leading else "stands by")
            self._reopen_at = now
        self._found_again("Postgres")
        if self.leading and now >= self._reopen_at:
            self._reopen(now)
        if self.leading and now >= self._finish_at:
            self._finish_batches()
        if self.leading and now - self._connected_since >= self._durations.lease_s:
            self._reclaim()

    def _finish_batches(self) -> None:
        """Each open batch is looked at, of thousands perhaps: so seldom that it takes a small part of the time."""
        began = time.monotonic()
        try:
            self._store.finish_batches(self.id)
            self._store.fold_tallies(self.id)
        finally:
            ended = time.monotonic()
            self._finish_at = ended + 20 * (ended - began)

    def _reclaim(self) -> None:
        """Only after one full lease of our own without a break: an outage of Postgres costs nobody a claim."""
        for job_id, state in self._store.reclaim(self.id, lease_s=self._durations.lease_s):
            self.counts.reclaimed += 1
            log.warning("job %s: its worker is lost; now %s", job_id, state)

    def _reopen(self, now: float) -> None:
        """A worker of an older version, or a person, may have queued a job in a lane that is closed."""
        self._reopen_at = now + self._durations.lease_s
        if reopened := self._store.reopen_lanes(self.id):
            log.warning("%d lanes held queued jobs though they were closed: they are open again", reopened)

    def _audit(self, now: float) -> None:
        """Publish again what Redis should hold and does not, and no worker has claimed in time."""
        if now < self._audit_at:
            return
        self._mend_queue()
        audit_s = 0 if self._missing else self._durations.audit_s  # after an outage nothing is taken for granted
        overdue = self._store.overdue_messages(self.id, audit_s=audit_s)
        waiting = self._queue.waiting() if overdue else set()
        lost = [outgoing for outgoing in overdue if outgoing.message.task_id not in waiting]
        if lost:
            self.counts.republished += len(lost)
            self._store.republishing(self.id, [outgoing.message for outgoing in lost])
            self._queue.publish(lost)
        self._losses.note(len(lost), now)
        self._audit_at = now + self._durations.audit_s / 3
        self._found_again("Redis")

    def _mend_queue(self) -> None:
        """Empty a queue that cannot be this farm's: no worker could take anything from it, or not for hours."""
        try:
            length = self._queue.depth()
        except Unavailable as error:
            if WRONG_TYPE not in str(error):
                raise
            log.warning("a key of the queue in Redis is of another type: the queue is emptied")
        else:
            if length <= MOST_WAITING:
                return
            log.warning("the queue in Redis holds %d messages, far more than were published: it is emptied", length)
        self._queue.clear()

    def _top_up(self) -> None:
        window = self._store.window(lease_s=self._durations.lease_s)
        room = self._room(window)
        if room > 0:
            self._fill(room, len(Priority))
        else:
            # One of these at a time: it is then itself the most urgent that is published.
            self._fill(1, min(priority.rank for priority, count in window.published.items() if count))

    def _room(self, window: Window) -> int:
        published = sum(window.published.values())
        rate = self._throughput.measured(published)
        return max(1, window.free + int(rate * 2 * self._durations.top_up_s)) - published

    def _fill(self, room: int, below: int) -> None:
        """Publish the next ``room`` jobs in fair order, up to the first whose rank is not below ``below``.

        In each round those who came short are passed over, and what is missing is shared by the others.
        """
        if not below:
            return
        lanes = {lane.id: lane for lane in self._store.lanes()}
        caps = Caps(room_to_draw(self._store.database), lanes)
        for reach in REACHES:
            turns = self._order.pick(caps.free(), room, reach)
            asks = Counter(takewhile(lambda lane_id: lanes[lane_id].priority.rank < below, turns))
            wanted = caps.within(asks.items())
            messages = _in_turn(self._store.next_messages(self.id, wanted, room), turns) if wanted else []
            self._order.charge(messages)
            self._publish(messages)
            room -= len(messages)
            if room <= 0 or not wanted:
                return
            caps.take(messages)
            for lane_id in self._close_short(wanted, messages):
                del lanes[lane_id]

    def _close_short(self, wanted: Mapping[int, int], messages: Sequence[Next]) -> list[int]:
        """The lanes that hold no more; they close, unless what they hold is delayed, or published and not claimed."""
        came = Counter(message.lane_id for message in messages)
        short = [lane_id for lane_id, count in wanted.items() if came[lane_id] < count]
        self._store.close_lanes(self.id, short)
        return short

    def _publish(self, messages: Sequence[Next]) -> None:
        if messages:
            self.counts.published += len(messages)
            self._throughput.published(len(messages))
            self._queue.publish(messages)

    def _resign(self) -> None:
        try:
            self._store.resign(self.id)
        except Unavailable:
            log.info("could not resign as leader; the post expires by itself")

    def _note_missing(self, error: Unavailable) -> None:
        if self._missing != error.dependency:
            self._missing = error.dependency
            log.error("dispatching stops until %s", error)
        self._renew_at = self._audit_at = 0.0  # the next turn asks both, before anything else
        if error.dependency == "Postgres":
            self._renewed_at = -math.inf

    def _found_again(self, dependency: str) -> None:
        """To be told only what has just done all that is asked of it."""
        if self._missing == dependency:
            log.info("%s answers again: dispatching goes on", dependency)
            self._missing = None


def _in_turn(messages: Iterable[Next], turns: Iterable[int]) -> list[Next]:
    """They come lane by lane, and are taken in the order in which they are published."""
    of_lane: defaultdict[int, deque[Next]] = defaultdict(deque)
    for message in messages:
        of_lane[message.lane_id].append(message)
    return [of_lane[lane_id].popleft() for lane_id in turns if of_lane[lane_id]]


class Caps:
    """The tenants that may have only so many images drawn at once. One that is full is passed over, as if it had
    nothing to do: it saves up no turns, and takes none of others'.

    ``left`` is how many messages may still be published for each; ``lanes`` are the ones of this turn, as they are now.
    """

    def __init__(self, left: dict[str, int], lanes: Mapping[int, Lane]) -> None:
        self._left = left
        self._lanes = lanes

    def free(self) -> Collection[Lane]:
        """The lanes of which at least one more job may be drawn."""
        if not self._left:
            return self._lanes.values()
        return [lane for lane in self._lanes.values() if self._left.get(lane.tenant, 1) > 0]

    def within(self, asks: Iterable[tuple[int, int]]) -> dict[int, int]:
        """Of what is to be asked of each lane, as much as its tenant may have."""
        left, wanted = dict(self._left), {}
        for lane_id, count in asks:
            tenant = self._lanes[lane_id].tenant
            allowed = min(count, left.get(tenant, count))
            if allowed > 0:
                wanted[lane_id] = allowed
            if tenant in left:
                left[tenant] -= allowed
        return wanted

    def take(self, messages: Iterable[Next]) -> None:
        """These were published."""
        for message in messages:
            tenant = self._lanes[message.lane_id].tenant
            if tenant in self._left:
                self._left[tenant] -= 1


class Losses:
    """Tells of lost messages when it begins and when it is over.

    While the bucket is away workers let every message go, and the audit publishes it again all the time.
    """

    def __init__(self, durations: Durations) -> None:
        self._over_after_s = 2 * durations.audit_s  # one that is lost again is found after 4/3 of that time
        self._count = 0
        self._last_at = 0.0

    def note(self, count: int, now: float) -> None:
        """So many were found to be lost by the audit of this moment, in seconds of one clock."""
        if count and not self._count:
            log.warning("%d messages were lost or not claimed in time; published again", count)
        if count:
            self._count += count
            self._last_at = now
        elif self._count and now - self._last_at > self._over_after_s:
            log.info("no message is lost any more; %d were published again", self._count)
            self._count = 0


class Throughput:
    """Claims a second, as the window's own emptying tells: no statement is needed for it.

    ``expecting`` is how many messages would be unclaimed if nobody had claimed any since the last look.
    """

    def __init__(self) -> None:
        self._rate = 0.0
        self.expecting = 0
        self._at = time.monotonic()

    def published(self, count: int) -> None:
        """These were added to the window."""
        self.expecting += count

    def measured(self, outstanding: int) -> float:
        """Claims a second over about the last second, given that ``outstanding`` messages are still unclaimed."""
        now = time.monotonic()
        elapsed_s = max(now - self._at, 1e-3)
        rate = max(0, self.expecting - outstanding) / elapsed_s
        weight = 1 - math.exp(-elapsed_s)
        self._rate = max(rate * weight + self._rate * (1 - weight), 0.0)
        self.expecting, self._at = outstanding, now
        return self._rate
