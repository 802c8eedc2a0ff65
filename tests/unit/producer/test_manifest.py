import io

import pytest

from producer.jobs.contract import Submission
from producer.manifest import ManifestError, ManifestKind, accept, read


def submissions(
    text: str,
    kind: ManifestKind = ManifestKind.CSV,
    *,
    name: str | None = None,
    partial: bool = False,
    **defaults: object,
) -> list[Submission]:
    kept: list[Submission] = []
    rows = read(io.StringIO(text, newline=""), kind, name_template=name, defaults=defaults)
    accept(rows, keep=kept.append, partial=partial)
    return kept


def test_each_row_is_a_submission_and_an_empty_cell_takes_the_default() -> None:
    rows = submissions('prompt,width,steps\n"a, b",728,\nc,,20\n', steps=8, width=300)
    assert [(row.prompt, row.width, row.steps) for row in rows] == [("a, b", 728, 8), ("c", 300, 20)]


def test_a_name_is_made_from_columns_of_the_file_and_from_fields_of_the_request() -> None:
    rows = submissions("sku,prompt,width\nA1,x,728\n", name="{sku}_{width}x{height}.png")
    assert rows[0].name == "A1_728x1024"


def test_jsonl_rows_are_submissions_and_empty_lines_are_passed_over() -> None:
    rows = submissions('{"prompt": "a"}\n\n{"prompt": "春", "seed": 7}\n', ManifestKind.JSONL)
    assert [(row.prompt, row.seed) for row in rows] == [("a", None), ("春", 7)]


def test_a_quoted_cell_may_hold_line_breaks() -> None:
    assert submissions('prompt\n"a\nb"\n')[0].prompt == "a\nb"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("prompt\n", "holds no rows"),
        ("prompt,colour\na,b\n", "line 1, column 'colour': is no column"),
        ("prompt,prompt\na,b\n", "line 1, column 'prompt': is there twice"),
        ("width\n64\n", "line 1, column 'prompt': is missing"),
        ("prompt;width\na;64\n", "line 1: its columns are separated by semicolons: save it with commas"),
        ("prompt\twidth\na\t64\n", "line 1: its columns are separated by tabs: save it with commas"),
        (
            "Prompt,WIDTH\na,64\n",
            "column 'Prompt': is no column of a request, nor used by --name: write 'prompt'\nline 1, column 'WIDTH'",
        ),
        ("prompt,width\na,64\nb,0\n", "line 3, column 'width': Input should be greater than or equal to 64"),
        ("prompt,width\na,wide\n", "line 2, column 'width'"),
        ("prompt\na\nb,c\n", "line 3: has 2 cells and the header 1"),
        ('prompt\n"a\n', "line 2: is no CSV"),
        ('prompt\na\n"b\nc\nd\n', "line 3: is no CSV: a quote is opened in this row and closed nowhere below"),
        ('prompt,width\n"a\nb",64\n"c\nd",0\n', "line 4, column 'width'"),
        (f"prompt\n\n{'a' * 131_073}\n", "line 3: is no CSV: a cell has more than 131072 characters"),
        ("prompt\n \t\n\x00\n", "line 3, column 'prompt': holds a NUL"),
    ],
)
def test_a_bad_manifest_is_told_by_line_and_column(text: str, told: str) -> None:
    with pytest.raises(ManifestError) as caught:
        submissions(text)
    assert told in str(caught.value)


def test_all_bad_rows_are_told_at_once_and_counted_beyond_twenty() -> None:
    with pytest.raises(ManifestError) as caught:
        submissions("prompt,width\n" + "a,0\n" * 25)
    assert caught.value.count == 25
    assert len(caught.value.problems) == 20
    assert "and 5 more" in str(caught.value)


def test_partial_keeps_the_good_rows() -> None:
    assert [row.prompt for row in submissions("prompt,width\na,0\nb,64\n", partial=True)] == ["b"]


def test_partial_with_no_good_row_is_still_refused() -> None:
    with pytest.raises(ManifestError):
        submissions("prompt,width\na,0\n", partial=True)


def test_names_that_clash_are_refused_whatever_their_case() -> None:
    with pytest.raises(ManifestError, match="is the name of line 2 already"):
        submissions("sku,prompt\nab,x\nAB,y\n", name="{sku}")


@pytest.mark.parametrize("template", ["{sku!r}", "{sku:>9}", "{sku.x}", "{0}", "{", "{sku[0]}"])
def test_a_name_template_takes_plain_columns_alone(template: str) -> None:
    with pytest.raises(ManifestError, match="--name"):
        submissions("sku,prompt\na,b\n", name=template)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", "a\\b", "CON:"])
def test_a_name_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="is no file name"):
        submissions(f"prompt,name\nx,{name}\n")


def test_a_file_that_is_not_utf_8_is_told_so() -> None:
    file = io.TextIOWrapper(io.BytesIO("prompt\ncafé\n".encode("latin-1")), encoding="utf-8-sig", newline="")
    with pytest.raises(ManifestError, match="UTF-8"):
        accept(read(file, ManifestKind.CSV), keep=lambda row: None)


def test_a_csv_that_breaks_off_is_told_with_the_problems_found_before_though_partial() -> None:
    with pytest.raises(ManifestError) as caught:
        submissions('prompt,width\na,0\nb,64\n"c', partial=True)
    assert [problem.line for problem in caught.value.problems] == [2, 4]
    assert caught.value.count == 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": "a", "seed": ' + "1" * 5000 + "}"])
def test_json_beyond_pythons_limits_is_a_problem_of_its_line(text: str) -> None:
    with pytest.raises(ManifestError, match="line 2: holds a number or a nesting"):
        submissions(f'{{"prompt": "a"}}\n{text}\n', ManifestKind.JSONL)


@pytest.mark.parametrize("field", ["seed", "guidance", "width"])
def test_a_number_that_python_still_reads_is_told_by_its_field(field: str) -> None:
    with pytest.raises(ManifestError, match=f"line 1, column '{field}'"):
        submissions(f'{{"prompt": "a", "{field}": {"9" * 4000}}}\n', ManifestKind.JSONL)


@pytest.mark.parametrize(
    ("text", "kind", "template", "column"),
    [
        ("prompt\na\n", ManifestKind.CSV, "a_{seed}", "seed"),
        ('{"prompt": "a", "sku": null}\n', ManifestKind.JSONL, "{sku}", "sku"),
        ('{"prompt": "a", "sku": ""}\n', ManifestKind.JSONL, "b{sku}", "sku"),
        ("prompt,sku\na,\n", ManifestKind.CSV, "b{sku}", "sku"),
    ],
)
def test_a_name_is_never_made_from_what_a_row_leaves_empty(
    text: str, kind: ManifestKind, template: str, column: str
) -> None:
    with pytest.raises(ManifestError, match=f"column '{column}': is empty, and --name uses it"):
        submissions(text, kind, name=template)


def test_a_name_may_be_made_from_a_seed_of_zero() -> None:
    assert submissions("prompt,seed\na,0\n", name="a_{seed}")[0].name == "a_0"


def test_what_is_left_out_is_told_with_the_number_of_rows_and_of_problems() -> None:
    text = "prompt,width,height\nok,64,64\n" + "a,0,0\n" * 15
    left_out = accept(read(io.StringIO(text, newline=""), ManifestKind.CSV), keep=lambda row: None, partial=True)
    assert (left_out.rows, left_out.count, len(left_out.problems)) == (15, 30, 20)
    assert str(left_out).endswith("\n… and 10 more\nleft out: 15 rows")


def test_a_column_that_only_the_name_template_knows_is_told_once_and_at_the_header() -> None:
    with pytest.raises(ManifestError, match="line 1, column 'skuu': is used by --name and is no column of the file"):
        submissions("sku,prompt\na,x\nb,y\n", name="{skuu}")
