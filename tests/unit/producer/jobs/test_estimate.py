"""What is drawn before a batch of one's own has ended: its part and others', as the fair order gives them."""

import pytest

from producer.jobs.contract import Priority
from producer.jobs.estimate import Waiting, until_drawn

STANDARD, BULK, URGENT = Priority.STANDARD.rank, Priority.BULK.rank, Priority.INTERACTIVE.rank


def drawn(
    *waiting: Waiting, weight: float = 1, tenant_weight: float = 1, priority: Priority = Priority.STANDARD
) -> float:
    return until_drawn(Waiting(priority.rank, "me", tenant_weight, weight, 10), waiting)


def test_alone_it_is_its_own_work() -> None:
    assert drawn() == 10


@pytest.mark.parametrize("tenant", ["me", "other"])
def test_a_large_batch_takes_turns_with_it_and_a_small_one_ends_before(tenant: str) -> None:
    assert drawn(Waiting(STANDARD, tenant, 1, 1, 20_000)) == 20
    assert drawn(Waiting(STANDARD, tenant, 1, 1, 3)) == 13


def test_weights_count() -> None:
    assert drawn(Waiting(STANDARD, "me", 1, 4, 20_000)) == 50
    assert drawn(Waiting(STANDARD, "other", 4, 1, 20_000)) == 50
    assert drawn(Waiting(STANDARD, "other", 1, 1, 20_000), tenant_weight=2) == 15
    assert drawn(Waiting(STANDARD, "me", 1, 1, 20_000), weight=2) == 15


def test_another_tenant_has_one_part_however_many_batches_it_has() -> None:
    assert drawn(*[Waiting(STANDARD, "other", 1, 1, 500)] * 9) == 20
    assert drawn(*[Waiting(STANDARD, "me", 1, 1, 500)] * 9) == 100


def test_priorities_share_16_to_4_to_1() -> None:
    assert drawn(Waiting(URGENT, "other", 1, 1, 20_000)) == 50
    assert drawn(Waiting(BULK, "other", 1, 1, 20_000)) == 12.5
    assert drawn(Waiting(STANDARD, "other", 1, 1, 20_000), priority=Priority.BULK) == 50
    assert drawn(Waiting(STANDARD, "other", 1, 1, 20), priority=Priority.BULK) == 30
