import threading

import pytest

from pipeline.errors import BrokenImage, Cancelled, Drained, Exhausted, PromptTooLong
from producer.jobs.contract import Outcome
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


def test_who_wants_the_room_alone_waits_for_the_others_and_keeps_new_ones_out() -> None:
    room, order = Room(), []
    inside, leave = threading.Event(), threading.Event()

    def among_others() -> None:
        with room.entered(alone=False):
            inside.set()
            leave.wait(5)
            order.append("first leaves")

    def alone() -> None:
        with room.entered(alone=True):
            order.append("alone")

    def late() -> None:
        with room.entered(alone=False):
            order.append("late")

    threads = [threading.Thread(target=among_others)]
    threads[0].start()
    assert inside.wait(5)
    for act in (alone, late):
        threads.append(threading.Thread(target=act))
        threads[-1].start()
        _until_waiting(threads[-1])
    assert order == []
    leave.set()
    for thread in threads:
        thread.join(5)
    assert order == ["first leaves", "alone", "late"]


def _until_waiting(thread: threading.Thread) -> None:
    """Give the thread the time to come to its wait; it may not get past it, however long this takes."""
    thread.join(0.05)
    assert thread.is_alive()
