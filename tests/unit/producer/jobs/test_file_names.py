"""What the images of a batch are called in one folder."""

import pytest

from producer.jobs.file_names import SHEETS, TABLES, FileNames


def names(*file_names: str) -> list[str]:
    given = FileNames()
    return [given.name(name, position) for position, name in enumerate(file_names)]


def test_every_image_has_a_file_of_its_own_whatever_the_jobs_are_called() -> None:
    assert names("x.png", "x-3.png", "x.png", "X.png") == ["x.png", "x-3.png", "x-4.png", "X-5.png"]


def test_an_accent_beside_its_letter_is_the_letter_with_its_accent() -> None:
    first, second = names("caf\u00e9.png", "cafe\u0301.png")
    assert (first, second) == ("caf\u00e9.png", "cafe\u0301-2.png")


def test_letters_that_are_one_only_after_both_are_folded_are_one_file() -> None:
    long_s, s = "\u017f\u0301.png", "\u015b.png"  # each with an acute accent
    assert names(s, long_s) == [s, "\u017f\u0301-2.png"]


def test_no_image_takes_the_place_of_a_table_or_of_a_contact_sheet() -> None:
    assert names("contact-sheet.png", "Results.csv") == ["contact-sheet-1.png", "Results-2.csv"]
    assert not {*SHEETS, *TABLES} & set(names(*SHEETS, *TABLES))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("..", "image"),
        ("a/..", "image"),
        ("", "image"),
        ("/", "image"),
        ("a\x00b\n.png", "a_b_.png"),
        ("x" * 300 + ".png", "x" * 200 + ".png"),
        ("茶" * 100 + ".png", "茶" * 66 + ".png"),
        ("\ud800.png", "?.png"),
    ],
)
def test_a_name_leads_nowhere_else_and_can_be_written(given: str, plain: str) -> None:
    assert names(given) == [plain]


def test_names_that_differ_only_in_what_was_cut_off_still_differ() -> None:
    first, second = names("x" * 300 + "1.png", "x" * 300 + "2.png")
    assert first != second


def test_a_hundred_thousand_names_alike_are_told_apart_in_a_moment() -> None:
    found = names(*["x.png"] * 100_000)
    assert len(set(found)) == 100_000
    numbered = [f"x-{number}.png" for number in range(20_001, 40_001)]
    found = names(*numbered, *["x.png"] * 20_000)
    assert (len(set(found)), found[-1]) == (40_000, "x-59999.png")
