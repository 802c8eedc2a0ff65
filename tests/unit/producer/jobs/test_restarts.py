from producer.jobs.restarts import Restarts


class Clock:
    """Time that goes on by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_worker_that_ends_at_once_is_started_later_each_time() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    pauses = []
    for _ in range(7):
        restarts.started("worker-0")
        pauses.append(restarts.ended("worker-0"))
        assert restarts.due() == []
        clock.now_s += pauses[-1]
        assert restarts.due() == ["worker-0"]
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_a_worker_that_lived_a_while_is_started_soon_again() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    for _ in range(4):
        restarts.started("worker-0")
        restarts.ended("worker-0")
    restarts.started("worker-0")
    clock.now_s += 60
    assert restarts.ended("worker-0") == 1


def test_a_worker_is_due_until_it_is_started() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    restarts.ended("worker-0")
    clock.now_s += 1
    assert restarts.due() == ["worker-0"]
    restarts.started("worker-0")
    assert restarts.due() == []
