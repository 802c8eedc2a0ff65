"""Manifests: what becomes a job, and what is told of the rest."""

import csv
import io
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from producer.jobs.contract import Entry, Rejection
from producer.manifest import (
    MESSAGE_MAX_CHARACTERS,
    PROBLEMS_MAX,
    ManifestError,
    ManifestKind,
    Reading,
    Recipe,
    size_sets,
)
from producer.manifest.csv_rows import LINE_MAX_CHARACTERS, ROW_MAX_LINES
from producer.manifest.json_rows import NESTING_MAX
from producer.manifest.recipe import (
    CARRIED_MAX,
    CARRIED_NAME_MAX_CHARACTERS,
    CHECKED_MAX_CHARACTERS,
    ROW_PROBLEMS_MAX,
)
from producer.manifest.record import BEGINNING_CHARACTERS, ROW_MAX_BYTES, Record


def reading(text: str | bytes, kind: ManifestKind = ManifestKind.CSV, **options: Any) -> Reading:
    body = text.encode() if isinstance(text, str) else text
    return Reading(io.BytesIO(body), kind, Recipe(**options))


def entries(text: str | bytes, kind: ManifestKind = ManifestKind.CSV, **options: Any) -> list[Entry]:
    found = list(reading(text, kind, **options).entries())
    return [entry for entry in found if isinstance(entry, Entry)]


def refusal(text: str | bytes, kind: ManifestKind = ManifestKind.CSV, **options: Any) -> str:
    with pytest.raises(ManifestError) as refused:
        list(reading(text, kind, **options).entries())
    return str(refused.value)


def test_each_row_is_a_job_with_its_line_and_columns_and_an_empty_cell_takes_the_default() -> None:
    found = entries('prompt,width,steps\n"a, b",728,\nc,,20\n', defaults=["steps=8", "width=300"])
    assert [(entry.submission.prompt, entry.submission.width, entry.submission.steps) for entry in found] == [
        ("a, b", 728, 8),
        ("c", 300, 20),
    ]
    assert (found[1].line, found[1].source) == (3, {"prompt": "c", "width": "", "steps": "20"})


def test_jsonl_rows_are_jobs_and_empty_lines_are_passed_over() -> None:
    found = entries('{"prompt": "a"}\n\n  \r\n{"prompt": "春", "seed": 7}', ManifestKind.JSONL)
    assert [(entry.line, entry.submission.prompt, entry.submission.seed) for entry in found] == [
        (1, "a", None),
        (4, "春", 7),
    ]


def test_a_template_makes_the_prompt_and_other_columns_come_along() -> None:
    text = "style,product,headline,price\nred,shoes,SALE,9.90\n"
    (entry,) = entries(text, template='A {style} banner for {product} with the text "{headline}" in {{braces}}')
    assert entry.submission.prompt == 'A red banner for shoes with the text "SALE" in {braces}'
    assert entry.source["price"] == "9.90"


@pytest.mark.parametrize("options", [{}, {"template": "a {prompt}"}], ids=["plain", "template"])
def test_a_column_that_nothing_uses_comes_along_with_or_without_a_template(options: dict[str, Any]) -> None:
    text = "prompt,sku,weight,quantity,title,style,price\nboat,A1,2 kg,7,Ann,red,9.90\n"
    found = reading(text, **options)
    (entry,) = found.entries()
    assert entry.source == dict(zip(*csv.reader(text.splitlines()), strict=True))
    assert found.carried == ["sku", "weight", "quantity", "title", "style", "price"]
    line = reading('{"prompt": "boat", "sku": "A1", "tags": ["x"]}', ManifestKind.JSONL, **options)
    (entry,) = line.entries()
    assert (entry.source["tags"], line.carried) == (["x"], ["sku", "tags"])


def test_columns_that_a_template_or_a_name_uses_are_not_only_carried_along() -> None:
    found = reading("style,sku,price\nred,A,9\n", template="{style} shoes", file_name="{sku}")
    assert (len(list(found.entries())), found.carried) == (1, ["price"])


def test_few_columns_that_come_along_are_remembered() -> None:
    lines = "\n".join(json.dumps({"prompt": "a", f"x{n}" + "y" * 10_000: n}) for n in range(150))
    found = reading(lines, ManifestKind.JSONL)
    assert len(list(found.entries())) == 150
    assert (len(found.carried), max(map(len, found.carried))) == (CARRIED_MAX, CARRIED_NAME_MAX_CHARACTERS)


def test_columns_whose_long_names_begin_alike_are_told_as_two() -> None:
    long = "x" * CARRIED_NAME_MAX_CHARACTERS
    found = reading(f"prompt,{long}a,{long}b\nboat,1,2\n")
    assert (len(list(found.entries())), found.carried) == (1, [long, long])


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("prompt,width\na;b,64\n", ","),
        ("prompt;width\na, b and c,64;64\n", ";"),
        ("prompt\twidth\na, b; c\t64\n", "\t"),
        ('prompt;width;"a, b, c, d"\na;64;x\n', ";"),
        ("prompt\na; b; c\n", ","),
        ("prompt;width;\na;64;\n", ";"),
        ("prompt,width,notes; internal; draft; old\na,64,b; c\n", ","),
        ("prompt,width,meta;a;b;c;d\na,64,x\n", ","),
        ("prompt\twidth\tname, short, de, at\na, b\t64\tx\n", "\t"),
        ('"Kommentar\n(de), kurz";prompt;width\nx;a, b;64\n', ";"),
        ("Produkt (de, at, ch);prompt;width\nx;a;64\n", ";"),
        ("sep=;\nprompt,x;width\na;64\n", ";"),
        ("SEP=,\r\nprompt,width\r\na;b,64\r\n", ","),
        ("sep=\t\t\nprompt\twidth\na\t64\n", "\t"),
    ],
)
def test_the_first_row_says_what_separates_the_cells(text: str, separator: str) -> None:
    template = {"template": "{prompt,x}"} if "prompt,x" in text else {}
    found = reading(text, defaults=["height=64"], **template)
    (entry,) = found.entries()
    assert isinstance(entry, Entry)
    assert found.separator == separator
    assert entry.submission.width == (1024 if text.startswith("prompt\n") else 64)


def test_columns_of_the_template_say_what_separates_the_cells_too() -> None:
    found = reading("Farbe;Ware, kurz\nrot;Schuhe, neu\n", template="{Farbe} {Ware, kurz}")
    (entry,) = found.entries()
    assert isinstance(entry, Entry)
    assert (found.separator, entry.submission.prompt) == (";", "rot Schuhe, neu")


def test_lines_are_counted_with_the_one_that_names_the_separator() -> None:
    assert "line 2, column 'widht'" in refusal("sep=;\nprompt;widht\na;64\n")
    assert "line 3, column 'width'" in refusal("sep=;\nprompt;width\na;0\n")
    assert "is empty: the first line must name the columns" in refusal("sep=;\n")
    assert "line 1: names '|' as what separates the cells" in refusal("sep=|\nprompt|width\na|64\n")


def test_a_decimal_comma_is_read_as_a_german_spreadsheet_means_it() -> None:
    found = entries("prompt;guidance\na;4,5\nb;4.5\nc; 7,25 \n")
    assert [entry.submission.guidance for entry in found] == [4.5, 4.5, 7.25]
    assert found[0].source["guidance"] == "4,5"
    for cell in ("1,000", "4,5,1", ",5"):
        assert "line 2, column 'guidance'" in refusal(f"prompt;guidance\na;{cell}\n")


def test_a_german_spreadsheet_is_read_as_it_is_saved() -> None:
    body = 'sku;prompt;width\r\nA;"Ein Banner; darauf ""SALE"", rot";64\r\n'.encode("utf-8-sig")
    (entry,) = entries(body)
    assert (entry.submission.prompt, entry.source["sku"]) == ('Ein Banner; darauf "SALE", rot', "A")


def test_cells_that_are_empty_at_the_end_of_a_row_and_rows_that_hold_nothing_are_no_fault() -> None:
    found = entries("prompt,width,,\na,64,,\nb,,,\n,,,\n\nc,80\n,\n")
    assert [(entry.line, entry.submission.width) for entry in found] == [(2, 64), (3, 1024), (6, 80)]


def test_cells_that_a_spreadsheet_left_out_at_the_end_of_a_row_are_empty_and_such_rows_are_counted() -> None:
    found = reading("prompt,name,sku,seed\na,b\nc\nd,e,f,7\ng,,\n", defaults=["seed=5"])
    made = [entry for entry in found.entries() if isinstance(entry, Entry)]
    assert [entry.submission.seed for entry in made] == [5, 5, 7, 5]
    assert made[0].source == {"prompt": "a", "name": "b", "sku": "", "seed": ""}
    assert found.short_rows == 3


@pytest.mark.parametrize(
    ("text", "options", "column"),
    [
        ("sku,prompt\nA,a\nB\n", {}, "prompt"),
        ("style,product,price\nred,shoes\nblue\n", {"template": "{style} {product}"}, "product"),
        ("prompt,sku,width\na,A,64\nb\n", {"file_name": "{sku}"}, "sku"),
        ("prompt,sku,width\na,A,64\nb,B\n", {"file_name": "{sku}_{width}"}, "width"),
    ],
)
def test_a_row_that_lacks_a_cell_that_is_needed_is_refused(text: str, options: dict[str, Any], column: str) -> None:
    assert f"line 3, column '{column}': is missing: the row has" in refusal(text, **options)


def test_a_default_stands_for_a_cell_that_is_left_out_and_needed() -> None:
    found = entries("sku,style\nA,red\nB\n", template="{style} shoes", defaults=["style=plain"])
    assert [entry.submission.prompt for entry in found] == ["red shoes", "plain shoes"]


@pytest.mark.parametrize(
    ("column", "field"),
    [
        ("width_px", "width"),
        ("height px", "height"),
        ("guidance scale", "guidance"),
        ("Guidance Scale", "guidance"),
        ("cfg_scale", "guidance"),
        ("CFG-Scale", "guidance"),
        ("inference_steps", "steps"),
        ("Num Inference Steps", "steps"),
        ("negative", "negative_prompt"),
        ("Negative Prompt", "negative_prompt"),
        ("negative-promt", "negative_prompt"),
        ("Steps", "steps"),
        ("widht", "width"),
        ("heigth", "height"),
        ("guidence", "guidance"),
        ("qualty", "quality"),
        ("priorty", "priority"),
        ("stepps", "steps"),
    ],
)
def test_a_column_that_plainly_means_a_field_is_refused_unless_the_field_is_there(column: str, field: str) -> None:
    told = refusal(f"prompt,{column}\na,5\n")
    assert f"column {column!r}: is no column of a request: write {field!r}" in told
    valid = {"format": "png", "priority": "bulk", "width": "64", "height": "64"}.get(field, "7")
    found = reading(f"prompt,{column},{field}\na,5,{valid}\n")
    assert (len(list(found.entries())), found.carried) == (1, [column])


@pytest.mark.parametrize(
    "column",
    ["speed", "mean", "eight", "weight", "with", "name2", "size2", "prompt2", "step", "sizes", "formal", "stems",
     "stews", "stops", "heights", "widths", "quantity", "title", "style"],
)  # fmt: skip
def test_words_of_ordinary_catalogues_are_nobodys_slips(column: str) -> None:
    found = reading(f"text,{column}\nboat,x\n", template="{text}")
    assert (len(list(found.entries())), found.carried) == (1, [column])


def test_a_size_that_is_too_small_to_be_drawn_says_how_it_is_had_all_the_same() -> None:
    told = refusal("prompt,size\na,320x50\nb,88x31\nc,1500x50\n")
    assert (
        "line 2, column 'height': Input should be greater than or equal to 64: draw 640x100 and scale it down" in told
    )
    assert "draw 264x93 and scale it down to 88x31" in told
    assert told.endswith("line 4, column 'height': Input should be greater than or equal to 64")
    assert len(entries("prompt,size\na,640x100\nb,264x93\n")) == 2
    with pytest.raises(ManifestError, match="draw 640x100 and scale it down to 320x50"):
        Recipe(vary=["size=leaderboard,320x50"])
    assert "draw 2048x100 and scale it down to 1024x50" in refusal("prompt,height\na,50\n")


def test_a_value_that_looks_like_a_template_is_put_in_as_it_is() -> None:
    (entry,) = entries("product\n{x.__class__} {0}\n", template="a {product}")
    assert entry.submission.prompt == "a {x.__class__} {0}"


def test_a_formula_is_text_like_any_other() -> None:
    (entry,) = entries('prompt\n"=CMD(""calc"")"\n')
    assert entry.submission.prompt == '=CMD("calc")'


def test_defaults_and_varied_values_fill_templates_too() -> None:
    found = entries(
        "product\nshoes\n",
        template="{mood} {product}",
        defaults=["mood=calm"],
        vary=["seed=1..2"],
        file_name="{seed}.png",
    )
    assert [(entry.submission.prompt, entry.submission.name) for entry in found] == [
        ("calm shoes", "1"),
        ("calm shoes", "2"),
    ]


def test_a_row_becomes_one_job_for_every_combination_in_order() -> None:
    found = entries(
        "sku,prompt\nA,a\nB,b\n",
        vary=["size=leaderboard,1024x1024", "seed=1..2,9"],
        file_name="{sku}_{size}_{seed}.png",
    )
    assert len(found) == 12
    assert [(entry.line, entry.submission.name) for entry in found[:4]] == [
        (2, "A_leaderboard_1"),
        (2, "A_leaderboard_2"),
        (2, "A_leaderboard_9"),
        (2, "A_1024x1024_1"),
    ]
    assert (found[0].submission.width, found[0].submission.height) == (728, 90)
    assert (found[11].line, found[11].submission.seed) == (3, 9)


def test_a_set_of_sizes_stands_for_all_of_it_and_each_can_be_drawn() -> None:
    for name in size_sets():
        found = entries("prompt\na\n", vary=[f"size={name}"], file_name="{size}")
        assert len({entry.submission.name for entry in found}) > 10


@pytest.mark.parametrize(
    ("columns", "cells", "defaults", "size"),
    [
        ("size", "728x90", [], (728, 90)),
        ("size", "Leaderboard", [], (728, 90)),
        ("size", "", ["size=300x250"], (300, 250)),
        ("width", "64", ["size=300x250"], (64, 250)),
        ("size", "64x80", ["width=300"], (64, 80)),
        ("width,height", "100,200", [], (100, 200)),
    ],
)
def test_a_size_stands_for_both_sides_and_the_row_goes_before_the_default(
    columns: str, cells: str, defaults: list[str], size: tuple[int, int]
) -> None:
    (entry,) = entries(f"prompt,{columns}\na,{cells}\n", defaults=defaults, file_name="{size}")
    assert (entry.submission.width, entry.submission.height) == size
    named = cells if columns == "size" and cells else f"{size[0]}x{size[1]}"
    assert entry.submission.name == named


@pytest.mark.parametrize("suffix", ["", ".png", ".jpg", ".webp", ".{format}"])
def test_a_name_is_made_from_columns_and_the_format_decides_the_suffix(suffix: str) -> None:
    (entry,) = entries("sku,prompt,width\nA1,x,728\n", file_name="{sku}_{width}x{height}" + suffix)
    assert entry.submission.name == "A1_728x1024"


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("template", "{x.__class__}", "{x.__class__} is no plain column"),
        ("template", "{0}", "{0} is no plain column"),
        ("template", "{}", "{} is no plain column"),
        ("template", "{a!r}", "{a!r} is no plain column"),
        ("template", "{a:>9}", "{a:>9} is no plain column"),
        ("template", "{a[0]}", "{a[0]} is no plain column"),
        ("template", "{a:{b}}", "is no plain column"),
        ("template", "{a", "expected '}'"),
        ("template", "a}", "Single '}'"),
        ("file_name", "{x.__class__}.png", "file_name: "),
        ("vary", ["seed"], "write field=value"),
        ("vary", ["seed="], "write field=value"),
        ("vary", ["seed=1..4", "seed=5"], "varied twice"),
        ("vary", ["seed=4..1"], "must rise"),
        ("vary", ["seed=0..999999999"], "1,000 values at most"),
        ("vary", ["seed=1..100", "steps=1..50"], "makes 5,000 images of each row"),
        ("vary", ["seed=1,1"], "is there twice"),
        ("vary", ["seed=1,,2"], "a value is empty"),
        ("vary", ["steps=1000"], "vary: steps: Input should be less than or equal to 100"),
        ("vary", ["size=32x32"], "vary: width: Input should be greater"),
        ("vary", ["size=mobile-baner-2x"], "did you mean 'mobile-banner-2x'?"),
        ("vary", ["size=64x64", "width=64"], "stands beside width or height"),
        ("vary", ["colour=red"], "'colour' is no field of a request"),
        ("defaults", ["steps"], "write field=value"),
        ("defaults", ["steps=1", "steps=2"], "is there twice"),
        ("defaults", ["steps=many"], "default: steps: "),
        ("defaults", ["colour=red"], "'colour' is no field"),
    ],
)
def test_a_wrong_option_is_told_before_any_row_is_read(option: str, value: Any, told: str) -> None:
    with pytest.raises(ManifestError) as refused:
        Recipe(**{option: value})
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("prompt\n", "holds no rows"),
        ("prompt,prompt\na,b\n", "line 1, column 'prompt': is there twice"),
        ("width\n64\n", "line 1, column 'prompt': is missing: the columns are width"),
        ("prompt|width\na|64\n", "line 1, column 'prompt': is missing: the columns are prompt|width"),
        ("prompt,,width\na,b,64\n", "line 1: column 2 has no name"),
        ("prompt,\na,b\n", "line 2: has 2 cells and the header names 1"),
        (
            "prompt;width\na;64\nb;64;c\n",
            "line 3: has 3 cells and the header names 2: put a cell that holds a semicolon",
        ),
        ('prompt;width\na;64\nb;"64\n', "line 3, column 'width': is no CSV: a quote is opened"),
        ("prompt;width\na;64\nb;0\n", "line 3, column 'width': Input should be"),
        ("Prompt,WIDTH\na,64\n", "column 'Prompt': is no column of a request: write 'prompt', or call it something"),
        ("promt,sku\na,b\n", "line 1, column 'promt': is no column of a request: write 'prompt'"),
        ("prompt,widht\na,64\n", "line 1, column 'widht': is no column of a request: write 'width'"),
        ("prompt,guidance_scale\na,4\n", "line 1, column 'guidance_scale': is no column of a request: write 'guid"),
        ("prompt,heigth\na,64\n", "column 'heigth': is no column of a request: write 'height'"),
        ("prompt,size,width\na,64x64,64\n", "line 1, column 'size': stands beside width or height"),
        ("prompt,width\na,64\nb,0\n", "line 3, column 'width': Input should be greater than or equal to 64"),
        ("prompt,width\na,wide\n", "line 2, column 'width'"),
        ("prompt,size\na,leaderbord\n", "line 2, column 'size': 'leaderbord' is no size that is known here: did you"),
        ("prompt\na\nb,c\n", "line 3: has 2 cells and the header names 1"),
        ('prompt\n"a\n', "line 2, column 'prompt': is no CSV: a quote is opened"),
        ('width,prompt\n64,a\n64,"b\nc\nd\n', "line 3, column 'prompt': is no CSV: a quote is opened"),
        ('prompt\n"a"b\n', "line 2: is no CSV"),
        ("prompt,name\na,../../etc/passwd\n", "line 2, column 'name': is no file name"),
        ("prompt,name\na,x\0y\n", "line 2, column 'name': holds a NUL"),
        (f"prompt,name\na,{'n' * 300}\n", "line 2, column 'name': is longer than 200 bytes"),
        ("prompt,name\na,Banner\nb,BANNER\n", "line 3, column 'name': 'BANNER' is the name of line 2 already"),
        ("prompt,name\na,Stra\u00dfe\nb,STRASSE\n", "line 3, column 'name'"),
        ("prompt,name\na,caf\u00e9\nb,cafe\u0301\n", "line 3, column 'name'"),
        ("prompt,name\na,\u015b\nb,\u017f\u0301\n", "line 3, column 'name'"),
        ("prompt,name\na,\nb,000001\n", "is the name of an image without a name already"),
        ("prompt,name\na,000002\nb,\n", "line 3, column 'name': '000002' is the name of line 2 already"),
    ],
)
def test_what_is_wrong_is_told_by_line_and_column(text: str, told: str) -> None:
    assert told in refusal(text)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{oops", "line 1: is no JSON"),
        ('["prompt"]', "line 1: is no JSON object"),
        ('{"prompt": "a", "guidance": NaN}', "beyond all measure"),
        ('{"prompt": "a", "guidance": 1e999}', "beyond all measure"),
        ("[" * 100_000, "beyond all measure"),
        ('{"prompt": "a", "x": ' + "[" * NESTING_MAX + "]" * NESTING_MAX + "}", "beyond all measure"),
        ('{"prompt": "a", "widht": 64}', "line 1, column 'widht': is no column of a request: write 'width'"),
        ('{"prompt": "a\\ud800"}', "lone surrogate"),
        ('{"prompt": "a\\u0000"}', "NUL"),
        ('{"width": 64}', "line 1, column 'prompt': Field required"),
        ('{"prompt": "' + "a" * 1_000_001, "line 1: is longer than 1,000,000 characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_line_of_json_is_told(line: str, told: str) -> None:
    assert told in refusal(line + "\n", ManifestKind.JSONL)


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("a\nx\n", {"template": "{a} {b}"}, "line 1, column 'b': is used by the template or the name"),
        ("a,b\nx,\n", {"template": "{a} {b}"}, "line 2, column 'b': is empty, and template uses it"),
        ("prompt,sku\nx,\n", {"file_name": "{sku}"}, "line 2, column 'sku': is empty, and file_name uses it"),
        ("prompt,a\nx,y\n", {"template": "{a}"}, "column 'prompt': is a column, but the template makes the prompt"),
        ("prompt,seed\nx,1\n", {"vary": ["seed=1..2"]}, "column 'seed': is varied, and is a column"),
        ("prompt,name\nx,n\n", {"vary": ["seed=1..2"]}, "'n' is the name of two images of this row"),
        ("prompt,sku\nx,A\n", {"vary": ["seed=1..2"], "file_name": "{sku}"}, "is the name of two images of this row"),
        ("sku,prompt\n../a,x\n", {"file_name": "{sku}"}, "line 2, column 'name': is no file name"),
        ("a,widht\nx,64\n", {"template": "{a}"}, "column 'widht': is no column of a request: write 'width'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_and_a_template_together_is_told(
    text: str, options: dict[str, Any], told: str
) -> None:
    assert told in refusal(text, **options)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom"])
def test_text_is_read_with_its_byte_order_mark(encoding: str) -> None:
    text = 'prompt\n"新茶\nséché"\n'
    if encoding.endswith("-bom"):
        body = ("\ufeff" + text).encode(encoding.removesuffix("-bom"))
    else:
        body = text.encode(encoding)
    assert [entry.submission.prompt for entry in entries(body)] == ["新茶\nséché"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("prompt\nplain\nséché\n".encode("latin-1"), "line 3: is not UTF-8 text"),
        (b"prompt\n" + (b"a" * 5_000 + b"\n") * 500 + b"\xe9\n", "line 502: is not UTF-8 text"),
        ("prompt\na\n".encode("utf-16-le"), "UTF-16 without a byte order mark: save it as 'CSV UTF-8'"),
        ("prompt\na\n".encode("utf-32"), "is UTF-32: save it as"),
        (b"PK\x03\x04rest", "send it as .xlsx"),
        (b"\xd0\xcf\x11\xe0rest", "is an old .xls"),
        ("prompt\na\n".encode("utf-16")[:-1], "is no UTF-16 text"),
    ],
)
def test_another_encoding_is_refused_with_how_to_save_it(body: bytes, told: str) -> None:
    assert told in refusal(body)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_are_counted_over_quoted_line_breaks(newline: str) -> None:
    text = newline.join(["prompt,width", '"a', 'b",64', "", "c,0", ""])
    assert refusal(text) == "line 5, column 'width': Input should be greater than or equal to 64"


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("sku,prompt\nA,a\nB," + "b" * 10_000_000 + "\n", f"{csv.field_size_limit():,} characters"),
        ('sku,prompt\nA,a\nB,"' + f"{'b' * 99}\n" * 100_000 + '"\n', f"{csv.field_size_limit():,} characters"),
        ('sku,prompt\nA,a\nB,"' + "b\n" * 5_000_000 + '"\n', f"{ROW_MAX_LINES:,} lines"),
        ("sku,prompt\nA,a\nB," + "b" * 200_000 + ",c\n", f"{csv.field_size_limit():,} characters"),
    ],
    ids=["one line", "many lines", "many short lines", "in the middle"],
)
def test_a_cell_of_ten_megabytes_is_refused_by_row_and_column(text: str, most: str) -> None:
    told = refusal(text, file_name="{sku}")
    assert told.startswith("line 3, column 'prompt'"), told[:200]
    assert most in told


@pytest.mark.parametrize("cell", ['"\n",', f'"{"b" * 99_000}\n",'], ids=["lines", "characters"])
def test_a_row_of_many_cells_over_many_lines_is_not_read_to_its_end(cell: str) -> None:
    told = refusal("prompt,width\na,64\n" + cell * (20_000_000 // len(cell)))
    assert told.startswith("line 3, column '"), told[:200]
    assert f"more than {ROW_MAX_LINES:,} lines or {LINE_MAX_CHARACTERS:,} characters" in told


@pytest.mark.parametrize(
    ("text", "kind", "line", "column"),
    [
        ("prompt,a,b\nx,1,2\ny," + "a" * 40_000 + "," + "b" * 30_000 + "\n", ManifestKind.CSV, 3, "a"),
        ("prompt,a\nx," + "春" * 22_000 + "\n", ManifestKind.CSV, 2, "a"),
        ("prompt," + "a" * 65_536 + "\nx,1\n", ManifestKind.CSV, 2, "a" * 100),
        ("prompt\n" + "a" * 70_000 + "\n", ManifestKind.CSV, 2, "prompt"),
        (json.dumps({"prompt": "x", "tags": ["t" * 9] * 8_000, "b": "c" * 9_000}), ManifestKind.JSONL, 1, "tags"),
        (json.dumps({"prompt": "x", "n" * 66_000: 1}), ManifestKind.JSONL, 1, "n" * 100),
    ],
    ids=["cells", "characters of three bytes", "a name", "a prompt", "a list", "a field's name"],
)
def test_a_row_that_holds_more_than_may_come_along_is_refused_by_its_largest_column(
    text: str, kind: ManifestKind, line: int, column: str
) -> None:
    told = refusal(text, kind)
    assert told.startswith(f"line {line}, column '{column}': holds "), told[:200]
    assert told.endswith("a row has 65,536 at most, with what only comes along: shorten it, or leave the column out")


def test_a_row_up_to_its_limit_and_the_longest_prompts_are_taken() -> None:
    cell = "a" * (ROW_MAX_BYTES - len("prompt" + "x" + "sku"))
    assert len(entries(f"prompt,sku\nx,{cell}\n")) == 1
    assert "line 2, column 'sku': holds" in refusal(f"prompt,sku\nx,{cell}a\n")
    longest = dict.fromkeys(("prompt", "negative_prompt"), "🚢" * 8000)
    (entry,) = entries(json.dumps(longest), ManifestKind.JSONL)
    assert entry.source == longest


def test_with_partial_a_row_that_is_too_large_leaves_its_beginnings_and_no_long_message() -> None:
    wide = ",".join("w" * 5_000 for _ in range(90))
    text = f"prompt,{','.join(f'c{n:02}' for n in range(90))}\na,b\nc,{wide}\nd,e\n"
    before, rejected, after = reading(text).entries(partial=True)
    assert (before.line, after.line) == (2, 4)
    assert isinstance(rejected, Rejection)
    assert (rejected.line, rejected.field, rejected.source["prompt"]) == (3, "c00", "c")
    assert rejected.source["c01"] == "w" * BEGINNING_CHARACTERS + "…"
    assert 50_000 < len(json.dumps(rejected.source, ensure_ascii=False).encode()) < ROW_MAX_BYTES + 1_000
    lines = json.dumps({f"Promp{chr(0x4E00 + n)}" * 4: "" for n in range(600)}) + '\n{"prompt": "a"}'
    rejected = next(reading(lines, ManifestKind.JSONL).entries(partial=True))
    assert isinstance(rejected, Rejection)
    assert len(rejected.message) <= MESSAGE_MAX_CHARACTERS


def test_values_beyond_the_limit_are_not_expanded() -> None:
    began = time.process_time()
    with pytest.raises(ManifestError, match="seed: has more than 1,000 values"):
        Recipe(vary=["seed=" + ",".join(f"{n}001..{n + 1}000" for n in range(1, 2_000))])
    assert time.process_time() - began < 1
    assert len(entries("prompt\na\n", vary=["seed=1..500,501..1000"])) == 1_000


def test_a_template_is_not_filled_beyond_what_is_taken() -> None:
    cell = "a" * 60_000
    line = json.dumps({"a": cell})
    tracemalloc.start()
    try:
        for option, field in (("template", "prompt"), ("file_name", "name")):
            options = {"template": "{a}"} | {option: "{a}" * 2_000}
            told = refusal(line, ManifestKind.JSONL, **options)
            assert told.startswith("line 1, column 'prompt': has more than 8,000 characters") or field == "name", told
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    told = refusal('{"a": "' + "b" * 150 + '"}', ManifestKind.JSONL, template="{a}", file_name="{a}{a}")
    assert told == "line 1, column 'name': has more than 200 characters as file_name makes it"


def test_a_line_of_json_with_very_many_fields_is_refused_before_they_are_looked_at() -> None:
    lines = "\n".join(json.dumps({f"promt{n}": 1 for n in range(60_000)}, separators=(",", ":")) for _ in range(3))
    began = time.process_time()
    told = refusal(lines, ManifestKind.JSONL)
    assert told.startswith("line 1: has 60,000 fields: 700 are read at most"), told[:200]
    assert time.process_time() - began < 2
    found = reading(json.dumps({f"prompt{chr(0x4E00 + n)}": n for n in range(600)}), ManifestKind.JSONL)
    with pytest.raises(ManifestError):
        list(found.entries())
    assert found.count == ROW_PROBLEMS_MAX


def test_few_names_of_columns_are_remembered() -> None:
    recipe = Recipe(template="x")
    for n in range(40):
        recipe.entries(Record(1, {f"{n:02}" * 30_000: "a"}))
    remembered = sum(len(column) for columns in recipe._checked for column in columns)
    assert 0 < remembered <= CHECKED_MAX_CHARACTERS + 60_000


def test_a_row_without_end_is_not_read_to_its_end() -> None:
    assert "line 2" in refusal("prompt\n" + "," * (LINE_MAX_CHARACTERS + 5))


def test_the_first_problems_are_told_and_the_others_counted_and_nothing_follows_a_bad_row() -> None:
    manifest = reading("prompt,width\ngood,64\n" + "bad,0\n" * 25 + "good,64\n")
    yielded: list[Entry | Rejection] = []
    with pytest.raises(ManifestError) as refused:
        yielded.extend(manifest.entries())
    assert len(refused.value.problems) == PROBLEMS_MAX
    assert str(refused.value).endswith("… and 5 more")


def test_with_partial_the_bad_rows_are_rejections_with_what_they_held() -> None:
    found = list(reading("prompt,width\ngood,64\nbad,0\n,0\nfine,64\n").entries(partial=True))
    assert [type(entry) for entry in found] == [Entry, Rejection, Rejection, Entry]
    rejected = found[1]
    assert isinstance(rejected, Rejection)
    assert (rejected.line, rejected.source, rejected.field) == (3, {"prompt": "bad", "width": "0"}, "width")
    assert isinstance(found[2], Rejection)
    assert "line 4, column 'width'" in found[2].message


def test_a_row_is_rejected_with_all_that_is_varied_of_it() -> None:
    text = "prompt,sku\na,A\nb,a\nc,C\n"
    found = list(reading(text, vary=["seed=1..2"], file_name="{sku}_{seed}").entries(partial=True))
    assert [(type(entry), entry.line) for entry in found] == [
        (Entry, 2), (Entry, 2), (Rejection, 3), (Entry, 4), (Entry, 4),
    ]  # fmt: skip


def test_what_a_rejected_row_held_can_be_kept_in_postgres() -> None:
    body = '{"prompt": "a\\u0000", "x\\ud800": ["\\u0000"]}\n{"prompt": "b"}\n'
    rejected = next(reading(body, ManifestKind.JSONL).entries(partial=True))
    assert isinstance(rejected, Rejection)
    assert rejected.source == {"prompt": "a\ufffd", "x?": ["\ufffd"]}


def test_a_partial_manifest_without_a_good_row_is_refused() -> None:
    with pytest.raises(ManifestError, match="line 2"):
        list(reading("prompt,width\nbad,0\n").entries(partial=True))


class Endless(io.RawIOBase):
    """A CSV of so many rows that is never whole in memory."""

    def __init__(self, row: Callable[[int], str], rows: int) -> None:
        self._row = row
        self._rows = rows
        self.seek(0)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._lines: Iterator[bytes] = (self._row(n).encode() for n in range(self._rows))
        self._rest = b"sku,prompt\n"
        return 0

    def read(self, size: int = -1) -> bytes:
        while len(self._rest) < size and (line := next(self._lines, b"")):
            self._rest += line
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def test_memory_grows_by_little_more_than_a_hash_a_row() -> None:
    tracemalloc.start()
    try:
        file = Endless(lambda n: f"sku-{n:06d},{'p' * 200}\n", 5_000)
        manifest = Reading(file, ManifestKind.CSV, Recipe(file_name="{sku}"))  # type: ignore[arg-type]
        count = sum(1 for _ in manifest.entries())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 5_000
    assert peak < 2_000_000 + 200 * 5_000
