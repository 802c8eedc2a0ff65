"""Spreadsheets: what a person sees in a cell is what counts, and no file is believed about its size."""

import io
import zipfile
from datetime import date, datetime
from typing import Any

import pytest
from openpyxl import Workbook

from producer.jobs.contract import Entry
from producer.manifest import ManifestError, ManifestKind, Reading, Recipe, xlsx_rows


def spreadsheet(*rows: tuple[Any, ...]) -> bytes:
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    for row in rows:
        sheet.append(row)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def entries(body: bytes, **options: Any) -> list[Entry]:
    found = list(Reading(io.BytesIO(body), ManifestKind.XLSX, Recipe(**options)).entries())
    return [entry for entry in found if isinstance(entry, Entry)]


def refusal(body: bytes, **options: Any) -> str:
    with pytest.raises(ManifestError) as refused:
        entries(body, **options)
    return str(refused.value)


def rewritten(body: bytes, part: str, content: bytes) -> bytes:
    """The spreadsheet with another content of one part."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, content if name == part else old.read(name))
        if part not in old.namelist():
            new.writestr(part, content)
    return file.getvalue()


def with_parts(body: bytes, count: int) -> bytes:
    """The spreadsheet with so many more parts, all empty."""
    file = io.BytesIO(body)
    with zipfile.ZipFile(file, "a") as archive:
        for n in range(count):
            archive.writestr(f"xl/media/{n}", b"")
    return file.getvalue()


def sheet_of(rows: str) -> bytes:
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    return f'<worksheet xmlns="{space}">{rows}</worksheet>'.encode()


def with_sheet(rows: str) -> bytes:
    return rewritten(spreadsheet(("prompt",)), "xl/worksheets/sheet1.xml", sheet_of(rows))


def test_rows_of_the_first_sheet_are_jobs_by_their_line() -> None:
    body = spreadsheet((), ("prompt", "width", "guidance"), ("茶", 64, 4.5), (), ("b", None, 5.0))
    found = entries(body)
    assert [(entry.line, entry.submission.prompt, entry.submission.width) for entry in found] == [
        (3, "茶", 64),
        (5, "b", 1024),
    ]
    assert found[1].source == {"prompt": "b", "width": None, "guidance": 5}


def test_numbers_and_dates_are_text_in_a_template_as_a_person_sees_them() -> None:
    body = spreadsheet(
        ("n", "f", "day", "moment", "flag"),
        (7.0, 9.9, date(2026, 11, 27), datetime(2026, 11, 27, 8, 30), True),  # noqa: DTZ001 - as a sheet
    )
    (entry,) = entries(body, template="{n} {f} {day} {moment} {flag}")
    assert entry.submission.prompt == "7 9.9 2026-11-27 2026-11-27 08:30:00 true"


def test_a_formula_counts_by_its_result_and_by_its_text_while_it_has_none() -> None:
    (entry,) = entries(spreadsheet(("prompt",), ("=CMD()",)))
    assert entry.submission.prompt == "=CMD()"
    rows = (
        '<sheetData><row r="1"><c r="A1" t="str"><v>prompt</v></c></row><row r="2"><c r="A2" t="str"><f>A1&amp;"s"</f>'
    )
    (entry,) = entries(with_sheet(rows + "<v>prompts</v></c></row></sheetData>"))
    assert entry.submission.prompt == "prompts"


def test_what_is_wrong_is_told_by_row_and_column() -> None:
    told = refusal(spreadsheet(("prompt", "width"), ("a", 64), ("b", 1), (None, 64), ("d", "wide")))
    assert [line.partition(":")[0] for line in told.splitlines()] == [
        "line 3, column 'width'",
        "line 4, column 'prompt'",
        "line 5, column 'width'",
    ]


def test_what_is_wrong_with_the_header_is_told_by_its_row() -> None:
    assert refusal(spreadsheet((), (), ("prompt", "widht"), ("a", 64))).startswith("line 3, column 'widht'")


def test_a_row_that_holds_more_than_may_come_along_is_refused_by_its_largest_column() -> None:
    full, within = "a" * 32_767, "b" * 32_760  # what Excel takes in one cell, and what is left of the row
    told = refusal(spreadsheet(("prompt", "a", "b"), ("x", "a", "b"), ("y", full, within), ("z", full, full)))
    assert told.startswith("line 4, column 'a': holds 32,768 bytes, and the row 65,543: a row has 65,536 at most"), told


def test_a_cell_beyond_the_header_is_told() -> None:
    assert "line 2: holds a cell 2 to the right" in refusal(spreadsheet(("prompt",), ("a", None, "stray")))


@pytest.mark.parametrize("body", [b"", b"prompt\na\n", b"PK\x03\x04" + b"x" * 50, b"\xd0\xcf\x11\xe0"])
def test_what_is_no_spreadsheet_is_refused(body: bytes) -> None:
    assert "is no .xlsx spreadsheet that can be read" in refusal(body)


@pytest.mark.parametrize("content", [b"", b"<a>", b"no xml", b"<worksheet/>" * 2])
def test_a_broken_sheet_is_refused(content: bytes) -> None:
    assert "is no .xlsx" in refusal(rewritten(spreadsheet(("prompt",), ("a",)), "xl/worksheets/sheet1.xml", content))


def test_a_shared_text_that_is_not_there_is_refused() -> None:
    rows = '<sheetData><row r="1"><c r="A1" t="s"><v>99</v></c></row></sheetData>'
    assert "is no .xlsx" in refusal(with_sheet(rows))


def test_entities_are_refused() -> None:
    bomb = b'<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;">]><a>&y;</a>'
    told = refusal(rewritten(spreadsheet(("prompt",), ("a",)), "xl/worksheets/sheet1.xml", bomb))
    assert "declares entities" in told


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ('<dimension ref="A1:XFD1048576"/><sheetData><row r="9999999"><c/></row></sheetData>', "row has the number"),
        ('<sheetData><row r="1"><c r="XFD1"><v>1</v></c></row></sheetData>', "line 1: has more than 700"),
        (f'<sheetData><row r="3">{"<c/>" * 8000}</row></sheetData>', "line 3: has more than 700 columns"),
        ("<cols>" + "<col/>" * 100_001 + "</cols>", "too much that is no row"),
        (
            f'<sheetData><row r="4"><c r="B4" t="inlineStr"><is><t>{"a" * 200_000}</t></is></c></row></sheetData>',
            "line 4, column 'B': a cell has more than 131,072 characters",
        ),
    ],
    ids=["rows", "columns", "cells", "beside rows", "long cell"],
)  # fmt: skip
def test_absurd_dimensions_are_refused(rows: str, told: str) -> None:
    assert told in refusal(with_sheet(rows))


def with_shared(body: bytes, *texts: str, name: str = "xl/sharedStrings.xml") -> bytes:
    """The spreadsheet with a table of texts, as other programs write them."""
    items = "".join(f"<si><t>{text}</t></si>" for text in texts)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        types = archive.read("[Content_Types].xml").decode()
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    part = f'<Override PartName="/{name}" ContentType="{kind}"/></Types>'
    body = rewritten(body, "[Content_Types].xml", types.replace("</Types>", part).encode())
    return rewritten(body, name, sheet_of(items).replace(b"worksheet", b"sst"))


def test_texts_of_the_shared_table_are_read_and_a_long_one_is_refused_by_row_and_column() -> None:
    cells = '<c t="s"><v>0</v></c><c t="s"><v>1</v></c>', '<c t="s"><v>2</v></c><c t="s"><v>3</v></c>'
    body = with_sheet("<sheetData>" + "".join(f"<row>{row}</row>" for row in cells) + "</sheetData>")
    (entry,) = entries(with_shared(body, "sku", "prompt", "A", "a"), file_name="{sku}")
    assert (entry.submission.prompt, entry.submission.name) == ("a", "A")
    told = refusal(with_shared(body, "sku", "prompt", "A", "a" * 200_000), file_name="{sku}")
    assert told == "line 2, column 'prompt': a cell has more than 131,072 characters"


@pytest.mark.parametrize("part", ["xl/worksheets/sheet1.xml", "xl/sharedStrings.xml", "xl/styles.xml"])
def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_unpacked(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("UNPACKED_MAX_BYTES", "STRINGS_MAX_BYTES", "PART_MAX_BYTES"):
        monkeypatch.setattr(xlsx_rows, limit, 100_000)
    body = rewritten(spreadsheet(("prompt",), ("a",)), part, b" " * 1_000_000)
    assert len(body) < 20_000
    assert f"{part} unpacks to 1,000,000 bytes" in refusal(body)


def test_a_table_of_texts_is_limited_under_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    body = with_sheet('<sheetData><row><c t="s"><v>0</v></c></row><row><c t="s"><v>1</v></c></row></sheetData>')
    body = with_shared(body, "prompt", "a" * 200_000, name="xl/s.bin")
    assert "a cell has more than" in refusal(body)
    monkeypatch.setattr(xlsx_rows, "TEXTS_MAX", 1)
    assert "it holds more than 1 texts" in refusal(body)
    monkeypatch.setattr(xlsx_rows, "STRINGS_MAX_BYTES", 100_000)
    assert "xl/s.bin unpacks to 200," in refusal(body)


def test_a_sheet_is_counted_under_any_name_of_xml_and_not_opened_under_another() -> None:
    row = sheet_of('<sheetData><row r="2000000"><c t="str"><v>a</v></c></row></sheetData>')
    for name, told in (("xl/other.xml", "a row has the number 2,000,000"), ("xl/s.png", "has no usual name")):
        body = spreadsheet(("prompt",), ("a",))
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            links = archive.read("xl/_rels/workbook.xml.rels").decode()
        links = links.replace("/xl/worksheets/sheet1.xml", f"/{name}")
        assert name in links
        assert told in refusal(rewritten(rewritten(body, "xl/_rels/workbook.xml.rels", links.encode()), name, row))


def test_a_file_of_very_many_parts_is_refused_before_their_list_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    body = with_parts(spreadsheet(("prompt",), ("a",)), 300)
    assert len(entries(body)) == 1
    monkeypatch.setattr(xlsx_rows, "DIRECTORY_MAX_BYTES", 10_000)
    told = refusal(body)
    assert "too many parts" in told
    assert "10,000 are read at most" in told


def test_pictures_may_be_larger_than_what_is_read_but_all_together_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    body = rewritten(spreadsheet(("prompt",), ("a",)), "xl/media/image1.png", b"\0" * 5_000_000)
    assert len(entries(body)) == 1
    monkeypatch.setattr(xlsx_rows, "ALL_MAX_BYTES", 4_000_000)
    assert "all of it unpacks to 5," in refusal(body)
    monkeypatch.undo()
    monkeypatch.setattr(xlsx_rows, "UNREAD_MAX_BYTES", 4_000_000)
    assert "xl/media/image1.png unpacks to 5,000,000 bytes" in refusal(body)
