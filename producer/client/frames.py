"""Server-sent events as they come in, line by line (the WHATWG's HTML standard, 9.2.6), into events."""

import json
from collections.abc import Set
from typing import Any

from producer.client.models import Event

JOB_ENDS = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
BATCH_ENDS = frozenset({"batch.finished"})
FIRST_WAIT_S = 1.0


class Frames:
    """The events of one stream, over as many connections as it takes.

    ``last_id`` is where the next connection goes on, ``wait_s`` how long the farm wants to be left alone before it, and
    ``ended`` whether the newest event is one of ``ends``, after which no other is expected.
    """

    def __init__(self, ends: Set[str]) -> None:
        self._ends = ends
        self.last_id: str | None = None
        self.wait_s = FIRST_WAIT_S
        self.ended = False
        self._fields: dict[str, str] = {}

    def headers(self) -> dict[str, str]:
        """Of the next connection; what came of an event that was cut off is forgotten."""
        self._fields.clear()
        return {"Accept": "text/event-stream"} | ({"Last-Event-ID": self.last_id} if self.last_id else {})

    def fed(self, line: str) -> Event | None:
        """The event that this line completes."""
        if line:
            self._take(line)
            return None
        fields, self._fields = self._fields, {}
        if "id" in fields:
            self.last_id = fields["id"]
        if "data" not in fields:
            return None
        event = _event(fields)
        self.ended = event.kind in self._ends
        return event

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data" and "data" in self._fields:
            value = f"{self._fields['data']}\n{value}"
        if name == "retry" and value.isdecimal():
            self.wait_s = int(value) / 1000
        elif name in {"id", "event", "data"}:
            self._fields[name] = value


def _event(fields: dict[str, str]) -> Event:
    data: dict[str, Any] = json.loads(fields["data"])
    return Event.model_validate({"kind": fields.get("event"), **data, "id": fields.get("id"), "data": data})
