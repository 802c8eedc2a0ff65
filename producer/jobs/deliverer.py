"""Sends what webhooks are told, as Standard Webhooks (standardwebhooks.com) asks: signed, and under the same id until
the receiver takes it.

Beside a dispatcher, while that one leads. What is due is taken from Postgres with its attempt counted, and how it went
is written there; if this process dies in between, it is due again. So a receiver may be told the same twice, under
one id, and is never told nothing. A receiver that is slow or never ends costs its own deliveries time and nobody
else's: each webhook is sent a few at once, and each attempt has an end.
"""

import asyncio
import contextlib
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
from standardwebhooks import Webhook as Signer

from producer.jobs.answers import Answers
from producer.jobs.errors import Unavailable
from producer.jobs.events import Events
from producer.jobs.postgres import Database
from producer.jobs.public_addresses import AddressRefused, Resolve, checked_url, pinned, resolved
from producer.jobs.settings import Durations
from producer.jobs.webhooks import Attempt, Due, Webhooks

log = logging.getLogger(__name__)

MOST = 100
"""Attempts at once."""
MOST_EACH = 5
"""Of one webhook."""
TIMEOUT_S = 15.0
"""For a whole attempt: name, connection, headers of the answer."""
GATHER_S = 0.02
GONE = 410
Result = TypeVar("Result")


class Deliverer:
    """Delivers while ``leads`` says so. ``run`` it in a thread of its own."""

    def __init__(
        self,
        database: Database,
        durations: Durations,
        leads: Callable[[], bool],
        *,
        private: bool,
        resolve: Resolve = resolved,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._webhooks = Webhooks(database)
        self._events = Events(database)
        self._answers = Answers(database)
        self._durations = durations
        self._leads = leads
        self._private = private
        self._resolve = resolve
        self._timeout_s = timeout_s
        self._under_way: dict[asyncio.Task[Attempt], Due] = {}
        self._ended: list[tuple[Due, Attempt]] = []
        self._prune_at = 0.0
        self._missing = False

    def run(self, stop: threading.Event) -> None:
        """Deliver until ``stop`` is set; a missing Postgres is waited for, and said once."""
        asyncio.run(self._run(stop))

    async def _run(self, stop: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        # A name whose server is silent holds its thread for longer than its attempt: it must not keep others waiting,
        # and not what goes to Postgres.
        loop.set_default_executor(ThreadPoolExecutor(2 * MOST, "resolve"))
        # No connection is kept: the next one to this address may be for another name, and have another certificate.
        limits = httpx.Limits(max_connections=MOST, max_keepalive_connections=0)
        with ThreadPoolExecutor(1, "deliveries") as self._sql:
            async with httpx.AsyncClient(
                verify=httpx.create_ssl_context(), trust_env=False, follow_redirects=False, limits=limits, timeout=None
            ) as client:
                while not stop.is_set():
                    await self._round(client)
                    await self._rest()
                for task in self._under_way:
                    task.cancel()  # due again, for the next leader
                await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _rest(self) -> None:
        """Until something has ended, and what ends at the same moment; or until the next look is due."""
        if not self._under_way:
            await asyncio.sleep(self._durations.delivery_s)
            return
        await asyncio.wait(self._under_way, timeout=self._durations.delivery_s, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(GATHER_S)

    async def _round(self, client: httpx.AsyncClient) -> None:
        """Note what has ended, and begin what is due."""
        for task in [task for task in self._under_way if task.done()]:
            self._ended.append((self._under_way.pop(task), task.result()))
        try:
            await self._aside(self._note)
            if not self._leads():
                return
            for due in await self._aside(self._take):
                self._under_way[asyncio.create_task(self._attempt(client, due))] = due
            await self._aside(self._prune)
            self._missing = False
        except Unavailable as error:
            if not self._missing:
                log.warning("deliveries to webhooks wait for %s", error)
            self._missing = True
        except Exception:  # they wait in their table: say what happened, and go on
            log.exception("a round of deliveries failed")

    async def _aside(self, ask: Callable[[], Result]) -> Result:
        """Ask Postgres without holding up what is under way."""
        return await asyncio.get_running_loop().run_in_executor(self._sql, ask)

    def _note(self) -> None:
        self._webhooks.note([attempt for _, attempt in self._ended])
        for gone in {due.webhook_id for due, attempt in self._ended if attempt.status == GONE}:
            self._webhooks.disable(gone)
            log.warning("webhook %s is disabled: its receiver answered that it is gone", gone)
        self._ended.clear()

    def _take(self) -> list[Due]:
        busy = Counter(due.webhook_id for due in self._under_way.values())
        room = MOST - len(self._under_way)
        return self._webhooks.take(most=room, most_each=MOST_EACH, busy=busy, lease_s=4 * self._timeout_s)

    def _prune(self) -> None:
        """Now and then: events, deliveries and answers to idempotency keys are kept for some days.

        One portion a round, since deliveries wait for it.
        """
        now = time.monotonic()
        if now >= self._prune_at and not self._events.prune() + self._webhooks.prune() + self._answers.prune():
            self._prune_at = now + self._durations.sweep_s

    async def _attempt(self, client: httpx.AsyncClient, due: Due) -> Attempt:
        status = None
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await self._post(client, due)
            error = None if 200 <= status < 300 else f"it answered {status}"
        except TimeoutError:
            error = f"it did not answer within {self._timeout_s:g} s"
        except AddressRefused as refused:
            error = str(refused)
        except (httpx.HTTPError, OSError) as failed:
            error = f"the connection failed ({type(failed).__name__})"
        except Exception:
            log.exception("delivery %s could not be sent", due.id)
            error = "the farm made a mistake; its log tells more"
        again_s = None if error is None or status == GONE else self._again_s(due.attempts)
        return Attempt(due.id, status, error, again_s, due.attempts)

    def _again_s(self, attempts: int) -> float | None:
        """Until the next attempt, a little later at random, so that those who failed together do not come together."""
        waits_s = self._durations.delivery_waits_s
        return waits_s[attempts - 1] * random.uniform(1, 1.2) if attempts <= len(waits_s) else None

    async def _post(self, client: httpx.AsyncClient, due: Due) -> int:
        """The status of the answer. A host is tried at its further addresses while none takes the connection."""
        url = checked_url(due.url, private=self._private)
        *first, last = await pinned(url, self._resolve, private=self._private)
        message = _message(due, url) | {"timeout": httpx.Timeout(None, connect=self._timeout_s / (len(first) + 1))}
        for address in first:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await _status(client, address, message)
        return await _status(client, last, message)


async def _status(client: httpx.AsyncClient, address: httpx.URL, message: dict[str, Any]) -> int:
    """Of the answer, of which nothing else is read."""
    async with client.stream("POST", address, **message) as answer:
        return answer.status_code


def _message(due: Due, url: httpx.URL) -> dict[str, Any]:
    """The signed request, for the host of ``url`` wherever it is sent."""
    body = _body(due)
    headers = {
        "Host": url.netloc.decode("ascii"),
        "Content-Type": "application/json",
        "User-Agent": "ovis-batch",
        "webhook-id": str(due.id),
        "webhook-timestamp": str(int(due.now.timestamp())),
        "webhook-signature": Signer(due.secret).sign(str(due.id), due.now, body),
    }
    return {"content": body, "headers": headers, "extensions": {"sni_hostname": url.raw_host.decode("ascii")}}


def _body(due: Due) -> str:
    told = {"type": due.kind, "timestamp": due.created_at.isoformat(), "data": due.data}
    return json.dumps(told, separators=(",", ":"))
