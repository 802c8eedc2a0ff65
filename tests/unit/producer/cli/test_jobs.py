"""What the commands of those who want images say."""

from pathlib import Path
from uuid import uuid4

import pytest

from producer.cli import jobs
from producer.client import Batch, Client


def test_what_a_partial_submission_leaves_out_is_told_beside_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Batch.model_construct(id=uuid4(), name="m", jobs=1, counts={"queued": 1})
    monkeypatch.setattr(Client, "submit_batch", lambda self, name, rows: batch)
    manifest = tmp_path / "m.csv"
    manifest.write_text("prompt,width\ngood,64\n" + "bad,0\n" * 25)
    assert jobs.submit(file=manifest, partial=True, as_json=True) == 0
    output = capsys.readouterr()
    assert str(batch.id) in output.out
    assert "line 3, column 'width'" in output.err
    assert "… and 5 more" in output.err
    assert "left out: 25 rows" in output.err
    assert "left out" not in output.out
