"""Moves job ids from Postgres to Redis, and puts back what Redis lost. It alone publishes.

Redis holds only a small window: about one message a worker, or one second of measured throughput, whichever is more;
a window that was emptied between two looks is twice as large the next time, so that a farm is soon at full speed.
So Redis stays small however long the backlog is; order is decided late, in SQL; a cancelled job never leaves the
table; and what Redis should hold (the table ``messages``) can be compared with what it does hold.

Several dispatchers may run, one in every API process and others as a role of their own; one leads, by a row with an
expiry on the database's clock. Each turn notes its messages in Postgres first and publishes then: dying in between
leaves an overdue message, which the audit publishes again. A message that is published twice costs nothing, because
a claim succeeds only once.
"""

import logging
import math
import threading
import time
from dataclasses import dataclass
from uuid import UUID, uuid4

from producer.jobs.contract import Message
from producer.jobs.errors import Unavailable
from producer.jobs.queue import Queue
from producer.jobs.settings import Durations
from producer.jobs.store import Listener, Store

log = logging.getLogger(__name__)


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
        self._throughput = Throughput()
        self._renew_at = 0.0
        self._audit_at = 0.0
        self._connected_since: float | None = None
        self._missing: str | None = None

    def run(self, stop: threading.Event) -> None:
        """Take turns until ``stop`` is set; a missing Postgres or Redis is waited for, and said once."""
        while not stop.is_set():
            try:
                with self._store.listening() as listener:
                    self._take_turns(listener, stop)
            except Unavailable as error:
                self._note_missing(error)
                if error.dependency == "Postgres":
                    self._connected_since = None
            except Exception:  # the farm stands still without a dispatcher: say what happened, and go on
                log.exception("a turn of the dispatcher failed")
            stop.wait(self._durations.renew_s)
        self._resign()

    def _take_turns(self, listener: Listener, stop: threading.Event) -> None:
        while not stop.is_set():
            self.turn()
            if listener.wait(self._durations.top_up_s):
                stop.wait(self._durations.top_up_s / 20)  # several commits in a row are one turn

    def turn(self) -> None:
        """Renew the post when it is due; as the leader, sweep, audit, and fill the window. Raises: Unavailable."""
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew(now)
        if self.leading:
            self._audit(now)
            self._top_up()
            self._found_again()

    def _renew(self, now: float) -> None:
        self._connected_since = self._connected_since or now
        led = self.leading
        self.leading = self._store.lead(self.id, leader_s=self._durations.leader_s)
        self._renew_at = now + self._durations.renew_s
        if self.leading != led:
            log.info("dispatcher %s %s", self.id, "leads" if self.leading else "stands by")
        if self.leading and now - self._connected_since >= self._durations.lease_s:
            self._reclaim()

    def _reclaim(self) -> None:
        """Only after one full lease of our own without a break: an outage of Postgres costs nobody a claim."""
        for job_id, state in self._store.reclaim(self.id, lease_s=self._durations.lease_s):
            self.counts.reclaimed += 1
            log.warning("job %s: its worker is lost; now %s", job_id, state)

    def _audit(self, now: float) -> None:
        if now < self._audit_at:
            return
        self._audit_at = now + self._durations.audit_s / 3
        overdue = self._store.overdue_messages(self.id, audit_s=self._durations.audit_s)
        if not overdue:
            return
        waiting = self._queue.waiting()
        lost = [message for message in overdue if message.task_id not in waiting]
        if lost:
            log.warning("%d messages were lost or not claimed in time; published again", len(lost))
            self.counts.republished += len(lost)
            self._store.republishing(self.id, lost)
            self._queue.publish(lost)

    def _top_up(self) -> None:
        published, workers = self._store.window(lease_s=self._durations.lease_s)
        claimed_at_once = 0 if published else self._throughput.expecting
        rate = self._throughput.measured(published)
        # A window that was emptied was too small: twice as many next, so that a farm is at full speed in a second.
        room = max(1, workers, math.ceil(rate), 2 * claimed_at_once) - published
        if room > 0:
            self._publish(self._store.next_messages(self.id, room))

    def _publish(self, messages: list[Message]) -> None:
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

    def _found_again(self) -> None:
        if self._missing:
            log.info("%s answers again: dispatching goes on", self._missing)
            self._missing = None


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
