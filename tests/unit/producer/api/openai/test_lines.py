"""Inputs of batches: what is told of a bad line is never longer than a person reads."""

import io
import json
from typing import Any

import pytest

from producer.api.openai.lines import FAULTS_MAX, MESSAGE_MAX_CHARACTERS, Input, Refused
from producer.jobs.contract import Rejection


def input_of(**members: Any) -> Input:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a"}} | members
    return Input(io.BytesIO(json.dumps(line).encode()), [])


def test_of_very_many_faults_of_a_body_the_first_are_told() -> None:
    body = {f"field {n} {'x' * 300}": n for n in range(2_000)}
    (rejected,) = input_of(body={"prompt": "a"} | body).entries()
    assert isinstance(rejected, Rejection)
    assert rejected.message.startswith("field 0 x")
    assert len(rejected.message) == MESSAGE_MAX_CHARACTERS


def test_of_very_many_faults_of_a_line_the_first_are_told() -> None:
    with pytest.raises(Refused) as refused:
        list(input_of(**{f"x{n}": n for n in range(2_000)}).entries())
    assert len(refused.value.faults) == FAULTS_MAX


def test_a_rejected_line_holds_what_its_body_held_as_far_as_it_can_be_kept() -> None:
    nested: list[Any] = []
    for _ in range(500):
        nested = [nested]
    body = {"prompt": "a\x00\ud800", "size": "9x9", "seed": 7, "x\x00": True, "custom_id": "b", "deep": nested}
    (rejected,) = input_of(body=body | {"guidance_scale": 0.5, "user": None}).entries()
    assert isinstance(rejected, Rejection)
    assert list(rejected.source.items()) == [
        ("custom_id", "a"),
        ("prompt", "a\ufffd?"),
        ("size", "9x9"),
        ("seed", 7),
        ("x\ufffd", True),
        ("guidance_scale", 0.5),
    ]


def test_what_is_no_number_of_json_is_not_kept() -> None:
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "p", "n": 1e999}}'
    (rejected,) = Input(io.BytesIO(line), []).entries()
    assert isinstance(rejected, Rejection)
    assert rejected.source == {"custom_id": "a", "prompt": "p"}
