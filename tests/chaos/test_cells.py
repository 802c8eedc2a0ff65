"""The short form of every cell: what README promises, with all durations scaled down."""

from collections.abc import Iterator

import pytest

from tests.chaos import report, suite
from tests.chaos.cells import CELLS, Cell
from tests.chaos.nursery import Nursery
from tests.chaos.servers import Servers, running


@pytest.fixture(scope="module")
def chaos_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers that may be killed: not those of the other tests."""
    with running(tmp_path_factory.mktemp("chaos")) as servers:
        yield servers


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.stop()


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.number:02d} {cell.name}")
def test_nothing_is_lost_and_nothing_recorded_twice(cell: Cell, chaos_servers: Servers, nursery: Nursery) -> None:
    result = suite.run(cell, chaos_servers, nursery, long=False)
    print(report.table([result]))
    assert not result.problems
