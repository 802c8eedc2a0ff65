"""The evaluation, read by the real reader."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.tiny.evaluate import held_out_examples, main, score, true_renderings
from pipeline.tiny.reader import Reader, words_read


@pytest.mark.parametrize(
    ("lines", "text", "right"),
    [
        (("SALE 50%",), "sale50%", 2),
        (("BIG", "big"), "BIG", 1),  # a stretch that was read counts once
        (("BIG", "SALE"), "sale big", 2),  # in whatever order
        (("No. 7",), "No．7", 2),  # full-width signs are signs
        (("HOTEL",), "HOTEI", 0),
    ],
)
def test_words_count_as_read_whatever_their_case_order_and_spaces(
    lines: tuple[str, ...], text: str, right: int
) -> None:
    assert words_read(lines, text) == (right, sum(len(line.split()) for line in lines))


@pytest.mark.parametrize("size_px", [(256, 64), (256, 256)])
def test_the_reader_reads_true_pictures_and_nothing_where_there_is_nothing(size_px: tuple[int, int]) -> None:
    reader = Reader()
    examples = held_out_examples(*size_px, 8)
    true = score(reader, examples, true_renderings(examples, size_px))
    assert true.words_right >= 0.9 * true.words
    assert true.grounds_right == true.pictures
    empty = [np.full((size_px[1], size_px[0], 3), 90, np.uint8)] * len(examples)
    assert score(reader, examples, empty).words_right == 0


def test_the_command_writes_its_table_and_a_sheet_of_each_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompts", "2", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == table
    assert "| truth | 256×256 |" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {"truth-256x64.png", "truth-256x256.png"}


def test_without_the_reader_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert main(["--out", str(tmp_path)]) == 2
    assert "pip install" in capsys.readouterr().err
