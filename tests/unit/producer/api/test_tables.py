"""Tables: what a spreadsheet would run is inert wherever a program may take it for a cell."""

import pytest

from producer.api.errors import Invalid
from producer.api.tables import SHEET_MAX_COLUMNS, Table, csv_pieces, inert, xlsx_pieces


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("x;=HYPERLINK(A1);y", "x;'=HYPERLINK(A1);y"),
        ("x\t@SUM(A1)", "x\t'@SUM(A1)"),
        ("x\n=A1", "x\n'=A1"),
        ('x;"=A1;y', "x;'\"=A1;y"),
        ("=A1;=B1", "'=A1;'=B1"),
        ("a;-5;+3.5", "a;-5;+3.5"),
        ("a; b;c-d\ne=f", "a; b;c-d\ne=f"),
        ("-5", "-5"),
    ],
)
def test_a_formula_behind_another_separator_is_inert_too(text: str, written: str) -> None:
    assert inert(text) == written


def test_a_table_that_is_too_wide_for_a_workbook_is_refused_before_the_first_byte() -> None:
    table = Table([f"c{n}" for n in range(SHEET_MAX_COLUMNS)], "http://farm")
    with pytest.raises(Invalid) as refused:
        next(xlsx_pieces(table, []))
    (fault,) = refused.value.faults
    assert fault.field == "format"
    assert "16,384 columns at most" in fault.message
    assert next(csv_pieces(table, []))
