"""Whoever waits for a job is told, whatever goes wrong with asking."""

import asyncio
from collections.abc import Sequence
from uuid import UUID, uuid4

import pytest

from producer.api.openai.waiting import Waiting
from producer.jobs.contract import Standing, State
from producer.jobs.errors import NotFound, Unavailable


class Asked:
    """A store that answers only after some errors."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.found: dict[UUID, Standing] = {}

    def standings(self, job_ids: Sequence[UUID]) -> dict[UUID, Standing]:
        if self.errors:
            raise self.errors.pop(0)
        return {job_id: self.found[job_id] for job_id in job_ids if job_id in self.found}


@pytest.mark.parametrize("error", [Unavailable("Postgres", "gone"), RuntimeError("of no class")])
def test_asking_goes_on_after_any_error_and_it_is_logged_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def wait() -> None:
        job_id, asked = uuid4(), Asked(error, error, error)
        asked.found[job_id] = Standing(State.SUCCEEDED, None)
        await asyncio.wait_for(Waiting(asked.standings, pause_s=0.001).ended([job_id]), 30)

    asyncio.run(wait())
    assert [record.message for record in caplog.records] == [f"requests wait for images longer: {error}"]


def test_a_job_that_is_gone_is_not_waited_for() -> None:
    async def wait() -> None:
        await asyncio.wait_for(Waiting(Asked().standings, pause_s=0.001).ended([uuid4()]), 30)

    with pytest.raises(NotFound):
        asyncio.run(wait())
