"""What a body may hold before it is a submission."""

import json
import tracemalloc
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from producer.api import bodies
from producer.api.errors import Invalid, Malformed, TooLarge
from producer.jobs.contract import Submission


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nothing",
        b'{"guidance": NaN}',
        b'{"guidance": -Infinity}',
        b"\xff\xfe{",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=["empty", "cut", "word", "nan", "infinity", "utf-16", "latin-1", "nested", "digits"],
)
def test_what_is_no_json_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        bodies.parse(body)


def test_a_document_that_would_fill_the_memory_is_refused_before_it_is_parsed() -> None:
    body = b'{"name": "a", "jobs": [' + b"{}," * 5_000_000 + b"{}]}"
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="x-ndjson"):
            bodies.parse_batch(body)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        ({"prompt": "a", "width": 0}, "width", "64"),
        ({"prompt": "a", "height": 4096}, "height", "2048"),
        ({"prompt": "a", "colour": "red"}, "colour", "no field"),
        ({"prompt": "a\x00b"}, "prompt", "NUL"),
        ({"prompt": "a\ud800b"}, "prompt", "surrogate"),
        ({"prompt": "   "}, "prompt", "empty"),
        ({}, "prompt", "required"),
        ({"prompt": "a", "seed": 2**63}, "seed", str(2**63 - 1)),
        ({"prompt": "a", "priority": "first"}, "priority", "interactive"),
        ({"prompt": "a", "name": "../../etc/passwd"}, "name", "file name"),
        ({"prompt": "a", "bad\ud800field": 1}, "", "unicode string"),
        ({"prompt": "a", "x" * 5000: 1}, "x" * 400 + "…", "no field"),
        (["prompt"], "", "JSON object"),
        (None, "", "JSON object"),
    ],
)
def test_a_wrong_field_is_named(value: Any, field: str, words: str) -> None:
    with pytest.raises(Invalid) as refused:
        bodies.validated(Submission, value)
    (fault,) = refused.value.faults
    assert fault.field == field
    assert words in fault.message
    assert fault.model_dump_json()


def test_one_wrong_field_is_said_in_the_singular() -> None:
    with pytest.raises(Invalid, match=r"^1 field is wrong: nothing was submitted$"):
        bodies.validated(Submission, {"prompt": "a", "width": 0})
    with pytest.raises(Invalid, match=r"^2 fields are wrong: nothing was submitted$"):
        bodies.validated(Submission, {"prompt": "a", "width": 0, "steps": 0})


def test_a_json_batch_of_too_many_jobs_is_told_of_ndjson() -> None:
    body = json.dumps({"name": "big", "jobs": [{}] * (bodies.BATCH_MAX_JOBS + 1)}).encode()
    with pytest.raises(TooLarge, match="x-ndjson"):
        bodies.parse_batch(body)


def test_the_field_of_a_batch_is_named_with_its_place() -> None:
    body = json.dumps({"name": "b", "jobs": [{"prompt": "a"}, {"prompt": "a", "width": "wide"}]}).encode()
    with pytest.raises(Invalid) as refused:
        bodies.parse_batch(body)
    assert [fault.field for fault in refused.value.faults] == ["jobs.1.width"]


@pytest.mark.parametrize("name", ["", "  ", "a\x00b", "a\nb", "a\x1b[31m", "a\u2028b", "\ud800", "a" * 201])
def test_names_of_batches_hold_no_controls_and_are_short(name: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(bodies.BatchName).validate_python(name)


@pytest.mark.parametrize("name", ["Autumn 2026", "横幅\u3000秋", "👩‍🎨 posters", "a" * 200, "<script>"])
def test_names_of_batches_may_be_in_any_language(name: str) -> None:
    assert TypeAdapter(bodies.BatchName).validate_python(name) == name
