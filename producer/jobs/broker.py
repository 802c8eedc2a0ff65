"""Celery's Redis transport, made safe from what is no message of this farm.

kombu takes whatever lies in its lists for JSON in its own envelope, and Celery believes every field of it: an error
there ends the whole worker. Here each entry is read as soon as it is taken from its list, before kombu sees it. What
is no message is logged, once, and dropped. Of what is one, job and claim alone are taken over, in an envelope made
here, so that nothing else in it can do harm.

Redis holds the lists and nothing else. kombu would note there what is not acknowledged, to give it back one day, and
every worker would stumble over what lies among those notes; the dispatcher's audit does this sooner and from Postgres.
"""

import json
import logging
from base64 import b64decode, b64encode
from typing import Any
from uuid import UUID, uuid4

import kombu
from kombu.transport import redis

from producer.jobs.contract import QUEUE, TASK, Message, Priority

log = logging.getLogger(__name__)

PRIORITY_STEPS = [priority.rank for priority in Priority]
"""kombu keeps a list for each step and takes from the lowest first (``Channel._brpop_start``)."""
LISTS = {priority: f"{QUEUE}{redis.Channel.sep}{priority.rank}" if priority.rank else QUEUE for priority in Priority}
"""The Redis lists, as ``Channel._q_for_pri`` names them."""
PRIORITIES = {name.encode(): priority for priority, name in LISTS.items()}
LONGEST_PAUSE_S = 3
CLAIM_MAX = 2**31 - 1
"""What the column of the claim holds."""
JSON, TEXT = "application/json", "utf-8"


class Rubbish(ValueError):
    """An entry of a queue that is no message; the words say why."""


def read_message(entry: bytes | str) -> Message:
    """The message that an entry of a queue stands for, if a worker can take it.

    Raises:
        Rubbish: it is not one that a dispatcher of this version writes.
    """
    try:
        envelope = json.loads(entry)
        _expect("task", envelope["headers"]["task"], TASK)
        _expect("content type", envelope["content-type"], JSON)
        (job_id, claim), _keywords, _embedded = json.loads(b64decode(envelope["body"], validate=True))
        message = Message(UUID(job_id), claim)
    except Rubbish:
        raise
    except Exception as error:  # whatever the parsers raise: the entry can be anything
        raise Rubbish(f"{type(error).__name__}: {error}") from error
    if type(claim) is not int or not 1 <= claim <= CLAIM_MAX:
        raise Rubbish(f"the claim is {claim!r}")
    return message


def _expect(what: str, found: object, wanted: str) -> None:
    if found != wanted:
        raise Rubbish(f"the {what} is {found!r}")


def envelope(message: Message, priority: Priority) -> dict[str, Any]:
    """The message as kombu's ``virtual.Message`` and Celery's task protocol 2 want it, with the least they need."""
    embedded = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    body = json.dumps([[str(message.job_id), message.claim], {}, embedded])
    return {
        "body": b64encode(body.encode()).decode(),
        "content-type": JSON,
        "content-encoding": TEXT,
        "headers": {"task": TASK, "id": message.task_id},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "delivery_tag": str(uuid4()),
            "priority": priority.rank,
        },
    }


class Channel(redis.Channel):
    """A channel whose consumer never sees rubbish, and that keeps no notes in Redis."""

    ack_emulation = False  # what is not acknowledged is known to this process alone
    do_restore = False  # and is not given back when it ends

    def _queue_bind(self, *_names: Any) -> None:
        """A message goes to its list by name: no table of bindings is asked."""

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)  # type: ignore[misc]  # not in the stubs
        client.set_response_callback("BRPOP", _message_alone)
        return client


class Transport(redis.Transport):
    """What ``broker_transport`` names."""

    Channel = Channel


class Connection(kombu.Connection):
    """A connection that looks for a missing Redis again every ``LONGEST_PAUSE_S`` at least.

    kombu's pauses grow to 30 s, and its callers in Celery give no others: after a long outage all that time would be
    lost once more.
    """

    def ensure_connection(  # type: ignore[override]  # which names each option
        self, *arguments: Any, **options: Any
    ) -> kombu.Connection:
        """As kombu's own, but for the pauses between two tries."""
        pauses = {"interval_start": 1, "interval_step": 1, "interval_max": LONGEST_PAUSE_S}
        return super().ensure_connection(*arguments, **options | pauses)


def _message_alone(popped: tuple[bytes, bytes] | None, **_options: Any) -> tuple[bytes, bytes] | None:
    """What BRPOP took, for kombu's ``_brpop_read``: None if that was nothing, or is dropped here."""
    if popped is None:
        return None
    name, entry = popped
    try:
        message = read_message(entry)
    except Rubbish as rubbish:
        log.error("dropped what is no message of this farm: %.200s; it begins with %.200r", rubbish, entry[:200])
        return None
    return name, json.dumps(envelope(message, PRIORITIES[name])).encode()
