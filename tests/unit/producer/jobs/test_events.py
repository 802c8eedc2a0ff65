"""Reading on from a cursor, whatever order transactions begin and end in."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from producer.jobs import events
from producer.jobs.events import Cursor, Snapshot, Target, news_of

BATCH = Target(batch_id=uuid4())


@dataclass(frozen=True)
class Row:
    transaction: int
    id: int
    kind: str = "job.running"
    batch_id: Any = BATCH.batch_id
    job_id: Any = None
    at: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    data: Any = None


class Table:
    """Events as Postgres shows them: those of a transaction appear when it has ended, all at once."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.running: set[int] = set()
        self.next = 5
        self._ids = 0

    def begin(self) -> None:
        self.running.add(self.next)
        self.next += 1

    def write(self, transaction: int) -> None:
        self._ids += 1
        self.rows.append(Row(transaction, self._ids, data={"id": self._ids}))

    def read(self, cursor: Cursor) -> events.News:
        found = []
        for _, _, first, after, last in events._ranges(BATCH, cursor):
            seen = [
                row
                for row in sorted(self.rows, key=lambda row: (row.transaction, row.id))
                if row.transaction not in self.running
                and (row.transaction, row.id) > (first, after)
                and row.transaction <= last
            ]
            found += seen[: events.PAGE]
        return news_of(cursor, found, Snapshot(self.next, frozenset(self.running)))


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_missed_and_nothing_is_told_twice_wherever_a_reader_goes_on(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PAGE", 3)
    chance, table = random.Random(seed), Table()
    cursor: Cursor = Cursor()
    heard: list[int] = []
    for _ in range(150):
        step = chance.random()
        if step < 0.3:
            table.begin()
        elif step < 0.6 and table.running:
            for _ in range(chance.randint(0, 5)):
                table.write(chance.choice(sorted(table.running)))
        elif step < 0.8 and table.running:
            table.running.remove(chance.choice(sorted(table.running)))
        else:
            cursor = read_some(table, cursor, heard, chance)
    table.running.clear()
    while table.read(cursor).events:
        cursor = read_some(table, cursor, heard, chance)
    assert sorted(heard) == [row.id for row in table.rows]
    assert len(heard) > 10


def read_some(table: Table, cursor: Cursor, heard: list[int], chance: random.Random) -> Cursor:
    """Where a reader goes on whose line may go dead among what it is told."""
    news = table.read(cursor)
    cut = chance.choice([len(news.events), chance.randint(0, len(news.events))])
    arrived = news.events[:cut]
    heard += [event.data["id"] for event in arrived]
    last = arrived[-1].cursor if arrived else cursor
    assert last is not None
    return Cursor.parse(str(news.cursor if cut == len(news.events) else last))


def test_a_slow_transaction_delays_no_other_and_is_told_when_it_ends() -> None:
    table = Table()
    table.begin()
    table.begin()
    table.write(5)
    table.write(6)
    table.running.remove(6)
    news = table.read(Cursor())
    assert [str(event.cursor) for event in news.events] == ["6-2~5-0"]
    assert not table.read(news.cursor).events
    table.running.remove(5)
    news = table.read(news.cursor)
    assert [str(event.cursor) for event in news.events] == ["6-2~5-1"]
    assert str(news.cursor) == "6-2", "what has ended need not be remembered"


RUBBISH = ("", "x", "1", "1-", "-1-2", "1-2~", "1-2~3-4", "1-2~1-0", "9-1~3", "1-2 ", "1-2\n", "٣-٤", f"{2**63}-1")


@pytest.mark.parametrize("written", [*RUBBISH, "5000-1" + "~1-1" * 1001, "9" * 20 + "-1"])
def test_what_is_no_cursor_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="no id of an event"):
        Cursor.parse(written)


def test_postgres_own_writing_of_a_snapshot_is_read() -> None:
    assert Snapshot.parse("10:10:") == Snapshot(10, frozenset())
    assert Snapshot.parse("10:20:10,14") == Snapshot(20, frozenset({10, 14}))
