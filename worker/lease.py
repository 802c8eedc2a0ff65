"""The worker's heartbeat, and the questions which of its claims still hold, and whether one should give way.

One row per worker carries the heartbeat, never the job's row. A claim that no longer holds (cancelled, reclaimed) is
dropped from the engine between two steps. A missing Postgres ends nothing: drawing goes on, and the fence of every
later write decides.
"""

import contextlib
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from pipeline.engine import Progress
from producer.jobs.contract import Claim, Fence, Message
from producer.jobs.errors import LostClaim, Unavailable
from producer.jobs.settings import Durations
from producer.jobs.store import Store
from worker.outages import Outages

log = logging.getLogger(__name__)


class Lease:
    """Keeps one worker's lease.

    ``progress`` tells how far each claim is that is being drawn, ``speed`` how fast; ``on_lost`` is called at each look
    at a claim that is lost and still held; ``make_room`` with a claim that should give way to a more urgent job.
    """

    def __init__(
        self,
        store: Store,
        worker_id: UUID,
        description: dict[str, Any],
        durations: Durations,
        outages: Outages,
        *,
        progress: Callable[[], Mapping[Any, Progress]],
        speed: Callable[[], float | None] = lambda: None,
        on_lost: Callable[[Message], None],
        make_room: Callable[[Message], None],
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._description = description
        self._outages = outages
        self._progress = progress
        self._speed = speed
        self._on_lost = on_lost
        self._make_room = make_room
        self._capacity = int(description["capacity"])
        self._durations = durations
        self._held: dict[Message, Claim] = {}
        self._lost: set[Message] = set()
        self._unheld: set[Message] = set()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(act, pause_s), name=name, daemon=True)
            for name, act, pause_s in (
                ("heartbeat", self.beat, durations.heartbeat_s),
                ("claim-check", self._check, durations.claim_check_s),
                ("urgent-check", self._give_way, durations.claim_check_s),
            )
        ]

    def start(self) -> None:
        """Register the worker, then keep its lease. Raises: Unavailable, if the first heartbeat fails."""
        self.beat()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End in order: the leader need not wait for the lease to lapse."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        try:
            self._store.farewell(self._worker_id)
        except Unavailable as error:
            log.warning("could not say farewell (%s); the lease will lapse", error)

    def beat(self) -> None:
        drawing = [
            {"job": str(message.job_id), "step": done.done, "steps": done.of}
            for message, done in self._progress().items()
        ]
        self._store.beat(self._worker_id, self._description, json.dumps(drawing), self._speed())

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Ask after this claim for as long as the body runs."""
        message = claim.message
        self._held[message] = claim
        try:
            yield
        finally:
            self._held.pop(message, None)
            self._lost.discard(message)

    def lost(self, claim: Claim) -> bool:
        """Whether the claim was seen not to hold any more."""
        return claim.message in self._lost

    def _check(self) -> None:
        """Compare what this worker believes to hold with what the table says that it holds."""
        believed = set(self._held)
        told = self._store.holding(self._worker_id)
        for message in (believed - told) & self._held.keys():
            self._lost.add(message)
            self._on_lost(message)
        self._give_back_unheld(told - believed - self._held.keys())

    def _give_back_unheld(self, unheld: set[Message]) -> None:
        """A claim whose answer was lost is running for the table and unknown here: seen twice, it goes back.

        Once is not enough: a claim is in the table a moment before it is held here.
        """
        for message in unheld & self._unheld - self._held.keys():
            log.warning("job %s: was claimed here unnoticed, and goes back to the queue", message.job_id)
            with contextlib.suppress(LostClaim):
                self._store.give_back(Fence(message.job_id, message.claim, self._worker_id))
        self._unheld = unheld

    def _give_way(self) -> None:
        """A worker whose places are all taken gives up one of the least urgent that it draws while a more urgent waits.

        One that is drawn and only waits for its upload would free nothing.
        Every full worker sees the same jobs waiting, so each does it by chance: together about one for each job.
        """
        held = list(self._held.values())
        drawn = [claim for claim in held if claim.message in self._progress()]
        if len(held) < self._capacity or not drawn:
            return
        least = max(drawn, key=lambda claim: claim.priority.rank).priority
        waiting = self._store.urgent_messages_per_worker(
            least, waiting_s=self._durations.claim_check_s, lease_s=self._durations.lease_s
        )
        if random.random() < waiting:
            self._make_room(random.choice([claim for claim in drawn if claim.priority is least]).message)

    def _repeat(self, act: Callable[[], None], pause_s: float) -> None:
        while not self._stop.wait(pause_s):
            try:
                with self._outages.watching("Postgres"):
                    act()
            except Unavailable:  # the outages have said it; if Postgres is away for us alone, our leases lapse
                continue
            except Exception:  # a worker without a heartbeat would lose every claim: say what happened, and go on
                log.exception("%s failed", threading.current_thread().name)
