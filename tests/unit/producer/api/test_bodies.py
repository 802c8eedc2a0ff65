"""What a body may hold before it is a submission."""

import io
import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from producer.api import bodies
from producer.api.errors import Invalid, Malformed, TooLarge
from producer.jobs.contract import Submission


def lines(*rows: Any) -> io.BytesIO:
    return io.BytesIO(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


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


def test_lines_are_submissions_and_blank_ones_are_passed_over() -> None:
    file = io.BytesIO(b'{"prompt": "a"}\n\n  \r\n{"prompt": "\xe8\x8c\xb6"}')
    assert [submission.prompt for submission in bodies.submissions(file)] == ["a", "茶"]


def test_wrong_lines_are_named_together_and_nothing_is_yielded_after_the_first() -> None:
    file = lines({"prompt": "a"}, {"prompt": "b", "width": 1, "steps": 0}, {"prompt": "c"})
    file.seek(0, io.SEEK_END)
    file.write(b"{nonsense\n")
    file.seek(0)
    yielded = []
    with pytest.raises(Invalid) as refused:
        yielded.extend(bodies.submissions(file))
    assert [(fault.line, fault.field) for fault in refused.value.faults] == [(2, "width"), (2, "steps"), (4, "")]
    assert len(yielded) < 3


def test_one_wrong_field_is_said_in_the_singular() -> None:
    with pytest.raises(Invalid, match=r"^1 field is wrong: nothing was submitted$"):
        bodies.validated(Submission, {"prompt": "a", "width": 0})
    with pytest.raises(Invalid, match=r"^2 fields are wrong: nothing was submitted$"):
        bodies.validated(Submission, {"prompt": "a", "width": 0, "steps": 0})


def test_no_more_than_twenty_faults_are_told() -> None:
    with pytest.raises(Invalid) as refused:
        list(bodies.submissions(lines(*[{"prompt": "a", "width": 1, "height": 1}] * 500)))
    assert len(refused.value.faults) == bodies.FAULTS_MAX


def test_a_file_without_lines_is_refused() -> None:
    with pytest.raises(Invalid, match="wrong"):
        list(bodies.submissions(io.BytesIO(b"\n \n")))


def test_a_line_without_end_is_refused_by_its_number() -> None:
    file = io.BytesIO(b'{"prompt": "a"}\n{"prompt": "' + b"a" * 3 * bodies.JOB_MAX_BYTES)
    with pytest.raises(Invalid) as refused:
        list(bodies.submissions(file))
    assert [fault.line for fault in refused.value.faults] == [2]


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
