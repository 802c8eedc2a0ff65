from uuid import UUID, uuid4

import pytest

from producer.jobs.store import Store


@pytest.fixture
def leader(store: Store) -> UUID:
    """A dispatcher that leads for longer than any test takes."""
    holder = uuid4()
    assert store.lead(holder, leader_s=600)
    return holder
