"""What the commands of those who want images say."""

import pytest
from pydantic import SecretStr

from producer.cli import jobs
from producer.client import Farm, Job, Worker
from producer.jobs.errors import SettingsError
from producer.jobs.settings import Settings

FIELDS = {
    "host": "h",
    "pid": 1,
    "device": "cpu",
    "model": "tiny",
    "revision": "0",
    "drawing": [],
    "heartbeat_age_s": 99,
}


@pytest.mark.parametrize("key", ["clé", "ovis_\udcff", "ovis_a\nb"])
def test_a_key_that_no_header_can_hold_is_a_wrong_setting(key: str) -> None:
    with pytest.raises(SettingsError, match="OVIS_API_KEY"):
        jobs.client_of(Settings(api_key=SecretStr(key)))


def test_the_farm_is_asked_with_the_key_of_the_settings() -> None:
    with jobs.client_of(Settings(api_key=SecretStr("ovis_a"))) as client:
        assert client._http.headers["Authorization"] == "Bearer ovis_a"


def test_a_worker_that_draws_in_8_bits_says_so_in_the_farms_table() -> None:
    worker = Worker.model_construct(
        host="h",
        pid=1,
        device="cuda:0",
        model="ovis",
        revision="sha256-1+fp8",
        drawing=[],
        heartbeat_age_s=1,
        live=True,
    )
    table = jobs._farm_table(Farm.model_construct(counts={}, workers=[worker]))
    assert list(table.columns[2].cells) == ["ovis+fp8"]
    assert table.caption is None


@pytest.mark.parametrize("workers", [[], [Worker.model_construct(live=False)]], ids=["none", "silent"])
def test_a_farm_of_which_no_worker_lives_says_what_starts_one(workers: list[Worker]) -> None:
    shown = [worker.model_copy(update=FIELDS) for worker in workers]
    assert jobs._farm_table(Farm.model_construct(counts={}, workers=shown)).caption == jobs.NO_WORKER


def test_why_jobs_failed_is_told_by_code_the_most_frequent_first_with_the_words_of_its_first_job() -> None:
    failed = [("late", "the device\nhung"), ("invalid", "300 tokens"), ("invalid", "400 tokens"), (None, None)]
    found = (Job.model_construct(error_code=code, error_message=message) for code, message in failed)
    assert list(jobs.failures(found)) == [
        "  2 failed, invalid: 300 tokens",
        "  1 failed, late: the device hung",
        "  1 failed, without a code: says nothing",
    ]
