"""The real API on real servers, and a hand that plays the worker."""

import threading
from collections.abc import Iterator

import httpx
import pytest

from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from tests.farm import Farmhand, serving


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    """Speaks to the API of an empty farm."""
    with serving(settings) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def hand(settings: Settings) -> Iterator[Farmhand]:
    farmhand = Farmhand(settings)
    yield farmhand
    farmhand.close()


class SlowBucket:
    """A bucket that hands out nothing until ``there`` is set; ``asked`` counts who waits for it."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.asked = threading.Semaphore(0)
        self._get = Storage.get

    def get(self, storage: Storage, key: str) -> bytes:
        self.asked.release()
        assert self.there.wait(60)
        return self._get(storage, key)


@pytest.fixture
def slow_bucket(monkeypatch: pytest.MonkeyPatch) -> SlowBucket:
    bucket = SlowBucket()
    monkeypatch.setattr(Storage, "get", lambda storage, key: bucket.get(storage, key))
    return bucket
