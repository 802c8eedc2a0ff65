"""What the thread beside the engine removes."""

from typing import Any, cast

from producer.jobs.storage import Storage
from worker.background import MOST_RUBBISH, Background


class Bucket:
    def __init__(self) -> None:
        self.deleted: list[list[str]] = []

    def delete(self, keys: list[str]) -> None:
        self.deleted.append(keys)


def test_what_one_request_cannot_delete_is_deleted_by_the_next() -> None:
    bucket: Any = Bucket()
    background = Background("images", cast(Storage, bucket), lambda: None)
    keys = [f"k{number}" for number in range(MOST_RUBBISH + 5)]
    for key in keys:
        background.throw_away(key)
    background.start()
    background.stop(30)
    assert bucket.deleted == [keys[:MOST_RUBBISH], keys[MOST_RUBBISH:]]
