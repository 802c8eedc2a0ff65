"""The real API on real servers, and a hand that plays the worker."""

from collections.abc import Iterator

import httpx
import pytest

from producer.jobs.settings import Settings
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
