"""What the commands of those who want images say."""

from pathlib import Path
from uuid import uuid4

import pytest

from producer.cli import jobs
from producer.client import Batch, Client, Farm, Job, Problem, Refused, ServerError, Unreachable, Worker


def test_what_a_partial_submission_leaves_out_is_told_beside_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Batch.model_construct(id=uuid4(), tenant="default", name="m", jobs=1, counts={"queued": 1})
    monkeypatch.setattr(Client, "submit_batch", lambda self, name, rows, **_: batch)
    manifest = tmp_path / "m.csv"
    manifest.write_text("prompt,width\ngood,64\n" + "bad,0\n" * 25)
    assert jobs.submit(file=manifest, partial=True, as_json=True) == 0
    output = capsys.readouterr()
    assert str(batch.id) in output.out
    assert "line 3, column 'width'" in output.err
    assert "… and 5 more" in output.err
    assert "left out: 25 rows" in output.err
    assert "left out" not in output.out


def _problem(status: int) -> Problem:
    return Problem(type="about:blank", title="no", status=status, detail="no")


@pytest.mark.parametrize(
    ("end", "known"),
    [
        (Unreachable("http://farm", "lost", heard=True), False),
        (Unreachable("http://farm", "away", heard=False), True),
        (ServerError(_problem(500)), False),
        (Refused(_problem(429)), False),
        (Refused(_problem(422)), True),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_a_submission_of_which_nobody_knows_tells_the_key_to_ask_again_with(
    end: BaseException,
    known: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys: list[str] = []

    def lose(self: Client, *_: object, key: str, **__: object) -> Job:
        keys.append(key)
        raise end

    monkeypatch.setattr(Client, "submit", lose)
    monkeypatch.setattr(Client, "submit_batch", lose)
    manifest = tmp_path / "m.csv"
    manifest.write_text("prompt\ngood\n")
    for what in ({"prompt": "a boat"}, {"file": manifest}):
        with pytest.raises(type(end)):
            jobs.submit(**what)
        assert (f"--key {keys[-1]} " in capsys.readouterr().err) == (not known)
    assert keys[0] != keys[1]


def test_a_worker_that_draws_in_8_bits_says_so_in_the_farms_table() -> None:
    worker = Worker.model_construct(
        host="h",
        pid=1,
        device="cuda:0",
        model="ovis",
        revision="sha256-1+fp8",
        drawing=[],
        heartbeat_age_s=1,
        live=True,
    )
    table = jobs._farm_table(Farm.model_construct(counts={}, workers=[worker]))
    assert list(table.columns[2].cells) == ["ovis+fp8"]
