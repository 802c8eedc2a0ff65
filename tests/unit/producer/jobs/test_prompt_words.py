from uuid import uuid4

import pytest

from producer.jobs.prompt_words import LONGEST_WORD, TOGETHER, WordRows, words_of


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A red ice-cream BANNER, 100%", ["a", "red", "ice", "cream", "banner", "100"]),
        ("L'École d'été", ["l", "école", "d", "été"]),
        ("开业 sale大吉", ["开", "业", "sale", "大", "吉"]),
        ("snake_case\x00'\\", ["snake", "case"]),
        ("x" * 99, ["x" * LONGEST_WORD]),
        ("!?…", []),
    ],
)
def test_words_are_runs_of_letters_and_digits_and_single_ideographs(prompt: str, words: list[str]) -> None:
    assert words_of(prompt) == words


def test_neighbours_share_a_row_up_to_a_number_of_them_and_a_size() -> None:
    batch = uuid4()
    with WordRows("it's", batch) as rows:
        for position in range(TOGETHER + 1):
            rows.add(uuid4(), position, f"a red{position}")
        for position in range(TOGETHER + 1, TOGETHER + 4):
            rows.add(uuid4(), position, " ".join(f"{position}{'x' * 30}{n}" for n in range(2000)))
        lines = "".join(rows.chunks()).splitlines()
    places = [tuple(map(int, line.split("\t")[3:5])) for line in lines]
    assert places == [(0, TOGETHER - 1), (TOGETHER, TOGETHER + 2), (TOGETHER + 3, TOGETHER + 3)]
    tenant, batch_id, job_id, _, _, words = lines[0].split("\t")
    assert (tenant, batch_id, job_id) == ("it's", str(batch), r"\N")
    assert {"'@it''s'", "'a'", "'red0'", "'red99'"} <= set(words.split(" "))


def test_a_job_alone_is_named_itself() -> None:
    job = uuid4()
    with WordRows("a", None) as rows:
        rows.add(job, 0, "a")
        assert "".join(rows.chunks()).split("\t")[1:5] == [r"\N", str(job), "0", "0"]


def test_nothing_submitted_makes_no_row() -> None:
    with WordRows("a", uuid4()) as rows:
        assert "".join(rows.chunks()) == ""
