import threading
from collections.abc import Callable
from uuid import uuid4

import pytest

from pipeline.errors import BrokenImage, Cancelled, Drained, Exhausted, PromptTooLong
from producer.jobs.contract import Claim, Outcome, Priority
from producer.jobs.errors import LostClaim, Unavailable
from worker.executor import Ending, Room, ending_of


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (PromptTooLong("prompt", 300, 246), Outcome.FAILED, "invalid_request"),
        (Exhausted(2048, 2048, "out of memory"), Outcome.FAILED, "exhausted"),
        (BrokenImage(3), Outcome.FAILED, "broken_image"),
        (Drained("stop"), Outcome.DRAINED, "drained"),
        (Cancelled("by a person"), None, "cancelled"),
        (LostClaim.__new__(LostClaim), None, "lost_claim"),
        (Unavailable("S3", "503"), Outcome.DRAINED, "unavailable"),
        (ZeroDivisionError("of no class"), Outcome.RETRIED, "internal"),
    ],
)
def test_every_class_of_error_has_its_outcome(error: Exception, outcome: Outcome | None, code: str) -> None:
    ending = ending_of(error)
    assert (ending.outcome, ending.code) == (outcome, code)


def test_only_an_error_of_no_class_keeps_its_traceback() -> None:
    assert ending_of(KeyError("x")) == Ending(Outcome.RETRIED, "internal", traced=True)
    assert not ending_of(BrokenImage(1)).traced


@pytest.fixture
def claimed() -> Callable[..., Claim]:
    def made(*, suspect: bool = False) -> Claim:
        return Claim(
            job_id=uuid4(),
            claim=1,
            worker_id=uuid4(),
            batch_id=None,
            priority=Priority.STANDARD,
            suspect=suspect,
            failures=0,
            waiting_s=0.0,
            request={},
            checkpoint_key=None,
            checkpoint_step=0,
            previews=0,
        )

    return made


class Visitor:
    """A thread that claims in the room's door, and stays until it is told to leave."""

    def __init__(self, room: Room, claim: Claim | None) -> None:
        self.at_the_door, self.began, self.leaving = threading.Event(), threading.Event(), threading.Event()
        self.patient = True
        self.claimed: Claim | None = None
        self._room, self._claim = room, claim
        self._thread = threading.Thread(target=self._visit, daemon=True)
        self._thread.start()

    def _visit(self) -> None:
        with self._room.entered(self._take, lambda: self.patient) as self.claimed:
            if self.claimed and self.claimed.suspect:
                self._room.wait_for_the_others(lambda: self.patient)
            self.began.set()
            self.leaving.wait(10)

    def _take(self) -> Claim | None:
        self.at_the_door.set()
        return self._claim

    def leave(self) -> None:
        self.leaving.set()
        self._thread.join(5)
        assert not self._thread.is_alive()

    def is_waiting(self, event: threading.Event) -> bool:
        """It does not come so far, however long this takes."""
        return not event.wait(0.05)


def test_many_share_the_room(claimed: Callable[..., Claim]) -> None:
    room = Room()
    visitors = [Visitor(room, claimed()) for _ in range(3)]
    assert all(visitor.began.wait(5) for visitor in visitors)
    for visitor in visitors:
        visitor.leave()


def test_a_suspect_waits_for_those_inside_and_while_it_is_there_nobody_claims(claimed: Callable[..., Claim]) -> None:
    room = Room()
    first = Visitor(room, claimed())
    assert first.began.wait(5)
    suspect = Visitor(room, claimed(suspect=True))
    assert suspect.at_the_door.wait(5)
    late = Visitor(room, claimed())
    assert suspect.is_waiting(suspect.began)
    assert late.is_waiting(late.at_the_door), "who could not begin must not claim"
    first.leave()
    assert suspect.began.wait(5)
    assert late.is_waiting(late.at_the_door)
    suspect.leave()
    assert late.began.wait(5)
    late.leave()


def test_who_loses_patience_at_the_door_claims_nothing(claimed: Callable[..., Claim]) -> None:
    room = Room()
    suspect = Visitor(room, claimed(suspect=True))
    assert suspect.began.wait(5)
    late = Visitor(room, claimed())
    assert late.is_waiting(late.at_the_door)
    late.patient = False
    assert late.began.wait(5)
    assert late.claimed is None
    assert not late.at_the_door.is_set()
    late.leave()
    suspect.leave()


def test_a_suspect_whose_patience_ends_opens_the_door_again(claimed: Callable[..., Claim]) -> None:
    room = Room()
    first = Visitor(room, claimed())
    assert first.began.wait(5)
    suspect = Visitor(room, claimed(suspect=True))
    assert suspect.is_waiting(suspect.began)
    suspect.patient = False
    assert suspect.began.wait(5)
    suspect.leave()
    late = Visitor(room, claimed())
    assert late.began.wait(5)
    for visitor in (late, first):
        visitor.leave()


def test_a_claim_of_nothing_and_one_that_fails_leave_the_door_open(claimed: Callable[..., Claim]) -> None:
    room = Room()

    def failing() -> Claim:
        raise ZeroDivisionError

    Visitor(room, None).leave()
    with pytest.raises(ZeroDivisionError), room.entered(failing, lambda: True):
        pass
    with pytest.raises(KeyError), room.entered(claimed, lambda: True):
        raise KeyError
    suspect = Visitor(room, claimed(suspect=True))
    assert suspect.began.wait(5), "nobody is inside"
    suspect.leave()
