"""The paths of batches: all or nothing, whatever their size."""

import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from tests.farm import Farmhand
from tests.integration.producer.api.test_jobs import assert_problem

BATCHES = "/api/v1/batches"
NDJSON = {"Content-Type": "application/x-ndjson"}


def line(**fields: Any) -> bytes:
    return json.dumps({"prompt": "a paper boat", "width": 64, "height": 64} | fields).encode() + b"\n"


def test_a_json_batch_is_found_with_its_jobs_in_order(api: httpx.Client, hand: Farmhand) -> None:
    jobs = [{"prompt": f"boat {n}", "width": 64, "height": 64} for n in range(5)]
    response = api.post(BATCHES, json={"name": "boats", "jobs": jobs})
    assert response.status_code == 201
    path = response.headers["location"]
    batch = api.get(path).json()
    assert (batch["name"], batch["jobs"], batch["finished"], batch["done"]) == ("boats", 5, 0, False)
    first = api.get(f"{path}/jobs", params={"limit": 3}).json()
    second = api.get(f"{path}/jobs", params={"limit": 3, "after": first["next"]}).json()
    assert [job["request"]["prompt"] for job in first["jobs"] + second["jobs"]] == [job["prompt"] for job in jobs]
    assert [job["file_name"] for job in second["jobs"]] == ["000004.png", "000005.png"]
    assert second["next"] is None
    hand.succeed(hand.store.batch_jobs(batch["id"])[1])
    (succeeded,) = api.get(f"{path}/jobs", params={"state": "succeeded"}).json()["jobs"]
    assert succeeded["position"] == 1
    assert [found["id"] for found in api.get(BATCHES).json()["batches"]] == [batch["id"]]


def test_lines_are_a_batch(api: httpx.Client) -> None:
    response = api.post(
        BATCHES, params={"name": "横幅"}, content=line(name="a") + b"\n" + line(name="b"), headers=NDJSON
    )
    assert response.status_code == 201, response.text
    assert (response.json()["name"], response.json()["jobs"]) == ("横幅", 2)


def test_one_bad_line_is_named_and_nothing_is_submitted(api: httpx.Client) -> None:
    body = line() * 2000 + line(width=0, stepps=64) + line() + b"{oops\n"
    problem = assert_problem(api.post(BATCHES, params={"name": "b"}, content=body, headers=NDJSON), 422)
    assert [(error["line"], error["field"]) for error in problem["errors"]] == [
        (2001, "stepps"),
        (2003, ""),
    ]
    assert api.get(BATCHES).json()["batches"] == []
    assert api.get("/api/v1/jobs").json()["jobs"] == []


def test_no_lines_or_a_bad_name_are_refused(api: httpx.Client) -> None:
    bad: list[tuple[dict[str, str], bytes]] = [
        ({"name": "b"}, b""),
        ({"name": "b"}, b"\n\n"),
        ({}, line()),
        ({"name": ""}, line()),
        ({"name": "a\x00"}, line()),
        ({"name": "a" * 201}, line()),
    ]
    for params, body in bad:
        assert_problem(api.post(BATCHES, params=params, content=body, headers=NDJSON), 422)


def test_a_json_batch_without_jobs_with_too_many_or_of_another_type_is_refused(api: httpx.Client) -> None:
    assert_problem(api.post(BATCHES, json={"name": "b", "jobs": []}), 422)
    assert_problem(api.post(BATCHES, json={"name": "b", "jobs": [{"prompt": "a"}], "extra": 1}), 422)
    assert_problem(api.post(BATCHES, content=line(), headers={"Content-Type": "text/plain"}), 415)
    problem = assert_problem(api.post(BATCHES, json={"name": "b", "jobs": [{"prompt": "a"}] * 10_001}), 413)
    assert "x-ndjson" in problem["detail"]


def test_a_caller_that_goes_away_while_sending_submits_nothing(api: httpx.Client) -> None:
    def broken() -> Iterator[bytes]:
        yield line() * 100
        raise KeyError("the caller's own trouble")

    with pytest.raises(KeyError):
        api.post(BATCHES, params={"name": "b"}, content=broken(), headers=NDJSON)
    time.sleep(0.3)
    assert api.get(BATCHES).json()["batches"] == []


def test_documents_on_their_way_fill_no_memory(api: httpx.Client) -> None:
    """The server is in this process, so its memory is this process's."""
    head = f"POST {BATCHES} HTTP/1.1\r\nHost: {api.base_url.host}\r\nContent-Type: application/json\r\n"
    piece, pieces = b" " * 1_000_000, 40
    before = psutil.Process().memory_info().rss
    with ExitStack() as callers:
        for _ in range(4):
            caller = socket.create_connection((api.base_url.host, api.base_url.port or 80), timeout=60)
            callers.enter_context(caller)
            caller.sendall(f"{head}Content-Length: {len(piece) * pieces + 1}\r\n\r\n".encode())
            for _ in range(pieces):
                caller.sendall(piece)
        grown = psutil.Process().memory_info().rss - before
    assert grown < 60_000_000, f"{grown:,} bytes of 160,000,000"
    assert api.get(BATCHES).json()["batches"] == []


def test_a_document_of_many_pieces_is_read_whole(api: httpx.Client) -> None:
    jobs = [{"prompt": f"boat {n} " + "x" * 900, "width": 64, "height": 64} for n in range(3_000)]
    response = api.post(BATCHES, json={"name": "boats", "jobs": jobs})
    assert response.status_code == 201, response.text
    assert len(response.request.content) > 2_000_000
    assert response.json()["jobs"] == 3_000


def test_two_hundred_thousand_lines_are_one_batch_in_constant_memory(api: httpx.Client) -> None:
    """The server is in this process, so its memory is this process's."""
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pieces = (
        b"".join(line(prompt=f"boat {at + n} in many words") for n in range(500)) for at in range(0, 200_000, 500)
    )
    response = api.post(BATCHES, params={"name": "all of it"}, content=pieces, headers=NDJSON, timeout=300)
    assert response.status_code == 201, response.text
    assert response.json()["jobs"] == 200_000
    assert api.get(f"{BATCHES}/{response.json()['id']}").json()["counts"]["queued"] == 200_000
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    assert grown_kb < 100_000
