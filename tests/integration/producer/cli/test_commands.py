"""What the commands say and how they end, against the real API."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from producer import cli
from producer.jobs.contract import State
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import Farmhand, environment, serving

Said = tuple[int, str, str]
"""The exit code, what was said, and what was said beside it."""
SMALL = "prompt,width,height,seed\na,64,64,1\nb,64,64,2\nc,64,64,3\n"


@pytest.fixture
def run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Said]]:
    """Runs ``ovis-batch`` with these words, and ``stdin`` instead of a terminal."""

    def ran(*words: str, stdin: str = "") -> Said:
        monkeypatch.setattr(sys, "argv", ["ovis-batch", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    with serving(settings) as url:
        monkeypatch.setenv("OVIS_API_URL", url)
        yield ran


@pytest.fixture
def hand(settings: Settings) -> Iterator[Farmhand]:
    farmhand = Farmhand(settings)
    yield farmhand
    farmhand.close()


Run = Callable[..., Said]


def submitted(run: Run, manifest: str = SMALL, *words: str) -> str:
    """The id of a new batch."""
    code, out, err = run("submit", "-f", "-", "--json", *words, stdin=manifest)
    assert code == 0, err
    return str(json.loads(out)["id"])


def test_the_status_of_a_batch_says_why_its_jobs_failed_and_so_does_who_waited(run: Run, hand: Farmhand) -> None:
    batch = submitted(run)
    first, second, third = hand.store.batch_jobs(UUID(batch))
    hand.fail(first, "the prompt has 300 tokens: 246 at most", "invalid_request")
    hand.fail(second, "the prompt has 400 tokens: 246 at most", "invalid_request")
    hand.succeed(third)
    why = "\n  2 failed, invalid_request: the prompt has 300 tokens: 246 at most\n"
    code, out, _ = run("status", batch)
    assert (code, why in out) == (0, True), out
    code, out, _ = run("wait", batch)
    assert (code, why in out) == (1, True), out
    assert json.loads(run("status", batch, "--json")[1])["counts"]["failed"] == 2


def test_a_batch_that_is_paused_says_how_it_goes_on(run: Run) -> None:
    batch = submitted(run)
    assert "resume" not in run("status", batch)[1]
    run("pause", batch)
    assert f"until: ovis-batch resume {batch}" in run("status", batch)[1]
    run("resume", batch)
    assert "resume" not in run("status", batch)[1]


@pytest.mark.parametrize(
    ("rows", "words", "code"),
    [
        ("a,64\n", (), 0),
        ("a,64\nb,1\n", (), 2),
        ("a,64\nb,1\n", ("--partial",), 0),
        ("b,1\n", ("--partial",), 2),
        ("b,1\n", ("--json",), 2),
        ("", (), 2),
    ],
)
def test_a_dry_run_ends_as_the_submission_would(run: Run, rows: str, words: tuple[str, ...], code: int) -> None:
    manifest = f"prompt,width\n{rows}"
    looked = run("submit", "-f", "-", "--dry-run", *words, stdin=manifest)
    assert (looked[0], run("submit", "-f", "-", *words, stdin=manifest)[0]) == (code, code), looked


def test_a_dry_run_tells_what_separates_the_cells_and_what_only_comes_along(run: Run) -> None:
    _, out, _ = run("submit", "-f", "-", "--dry-run", stdin="sku;prompt;price\nA;a boat;9,90\n")
    assert "its first row says that a semicolon separates the cells" in out
    assert "only carried along into the results: sku, price" in out
    _, out, _ = run("submit", "-f", "-", "--dry-run", stdin=SMALL)
    assert "first row" not in out
    assert "carried" not in out
    assert "shorter" not in out


def test_a_dry_run_tells_how_many_rows_were_shorter_than_the_header(run: Run) -> None:
    code, out, _ = run("submit", "-f", "-", "--dry-run", stdin="prompt,sku,seed\na,A,1\nb\nc,C\n")
    assert (code, "rows shorter than the header, their last cells taken as empty: 2\n" in out) == (0, True), out


def test_a_submission_tells_what_only_comes_along_beside_the_json(run: Run) -> None:
    manifest = "sku,prompt,Speed,shop\nA,a,1,x\n"
    for words in ((), ("--json",)):
        code, out, err = run("submit", "-f", "-", *words, "--name", "{sku}", stdin=manifest)
        assert (code, err) == (0, "only carried along into the results: Speed, shop\n"), out
    assert "carried" not in run("submit", "-f", "-", stdin=SMALL)[2]
    assert "carried" not in run("submit", "a boat")[2]


def test_what_was_there_already_is_counted_when_it_is_deduplicated(run: Run, hand: Farmhand) -> None:
    hand.beat()
    for job in hand.store.batch_jobs(UUID(submitted(run))):
        if job.position < 2:
            hand.succeed(job)
    code, out, err = run("submit", "-f", "-", "--deduplicate", stdin=SMALL)
    assert (code, out.startswith("submitted batch"), err) == (0, True, "there already: 2 of 3 images\n")
    one = ("submit", "a", "--width", "64", "--height", "64", "--deduplicate", "--seed")
    assert run(*one, "1")[2] == "there already: the image\n"
    assert run(*one, "9")[2] == "there already: nothing, so it is drawn\n"


def test_with_a_key_of_before_what_was_drawn_since_is_not_told_as_there_already(run: Run, hand: Farmhand) -> None:
    hand.beat()
    words = ("submit", "-f", "-", "--deduplicate", "--key", "order-1")
    told = "there already, or drawn since --key was first used"
    code, out, err = run(*words, "--json", stdin=SMALL)
    assert (code, err) == (0, f"{told}: 0 of 3 images\n")
    hand.succeed(hand.store.batch_jobs(UUID(json.loads(out)["id"]))[0])
    assert run(*words, stdin=SMALL)[2] == f"{told}: 1 of 3 images\n"
    one = ("submit", "a boat", "--deduplicate", "--key", "order-2")
    assert run(*one)[2] == f"{told}: nothing\n"


def test_a_batch_is_not_deleted_where_nobody_can_be_asked_and_it_is_said_how(run: Run, store: Store) -> None:
    batch = submitted(run)
    code, _, err = run("delete", batch)
    assert (code, "nothing was deleted" in err, "--yes (-y)" in err) == (2, True, True), err
    assert run("delete", batch, stdin="n\n")[0] == 130
    assert store.batch(UUID(batch)).jobs == 3
    assert run("delete", batch, stdin="y\n")[0] == 0
    assert run("delete", submitted(run), "-y")[0] == 0
    assert run("status", batch)[0] == 4


def test_tenants_are_given_weights_and_limits_and_shown(run: Run) -> None:
    assert run("tenants", "list")[1] == ""
    code, out, err = run("tenants", "set", "acme", "--weight", "2", "--max-queued", "1000", "--max-requests-s", "0.5")
    assert (code, out) == (0, "acme  weight 2  at most 1,000 waiting, 0.5 requests a second\n"), err
    assert run("tenants", "set", "acme", "--max-queued", "none", "--max-running", "3")[0] == 0
    assert run("tenants", "list")[1] == "acme  weight 2  at most 3 drawn at once, 0.5 requests a second\n"
    assert json.loads(run("tenants", "list", "--json")[1])["max_running"] == 3
    for words, told in (
        (("acme",), "say what changes"),
        (("acme", "--max-running", "many"), "--max-running: 'many' is neither"),
        (("acme", "--max-queued", "inf"), "--max-queued: 'inf' is neither"),
        (("acme", "--max-queued=-inf"), "--max-queued: '-inf' is neither"),
        (("acme", "--max-requests-s", "nan"), "--max-requests-s: 'nan' is neither"),
        (("acme", "--max-requests-s", "1e400"), "--max-requests-s: '1e400' is neither"),
        (("acme", "--weight", "1000"), "weight"),
        (("a b", "--weight", "1"), "name: must be"),
    ):
        code, _, err = run("tenants", "set", *words)
        assert (code, told in err) == (2, True), err


def test_whoever_makes_a_key_is_told_where_none_is_needed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hint = "an API on this machine alone (OVIS_API_HOST=127.0.0.1, OVIS_REQUIRE_KEYS not set) asks for no key"
    code, out, err = run("keys", "create", "shop")
    assert (code, hint in err) == (0, True), err
    assert re.fullmatch(r"ovis_\S+\n", out)
    for name, value in (("OVIS_REQUIRE_KEYS", "1"), ("OVIS_API_HOST", "0.0.0.0")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert hint not in run("keys", "create", "shop")[2]
            assert "asks for no key" not in run("keys", "create", "shop")[2]


def test_previews_of_one_prompt_are_asked_for_and_their_place_is_told(run: Run, hand: Farmhand) -> None:
    code, out, _ = run("submit", "a boat", "--previews", "2", "--json")
    job = hand.store.job(UUID(json.loads(out)["id"]))
    claim = hand.claim(job)
    assert (code, claim.previews) == (0, 2)
    assert "preview" not in run("status", str(job.id))[1]
    hand.store.note_preview(claim, "previews/1")
    assert f"/api/v1/jobs/{job.id}/preview" in run("status", str(job.id))[1]
    hand.store.fail(claim, "invalid", "no")
    assert hand.store.job(job.id).state is State.FAILED
    assert "preview" not in run("status", str(job.id))[1]


def test_previews_of_a_manifest_are_those_of_each_of_its_jobs(run: Run, hand: Farmhand) -> None:
    assert run("submit", "-f", "-", "--previews", "2", "--dry-run", stdin=SMALL)[0] == 0
    code, out, _ = run("submit", "-f", "-", "--previews", "2", "--json", stdin=SMALL)
    jobs = hand.store.batch_jobs(UUID(json.loads(out)["id"]))
    assert code == 0
    assert [hand.claim(job).previews for job in jobs] == [2] * len(jobs)


def test_a_retry_that_finds_nothing_says_so_and_what_would(run: Run) -> None:
    batch = submitted(run)
    for words in ((), ("--failed",), ("--failed", "--cancelled")):
        code, out, _ = run("retry", batch, *words)
        assert (code, "  nothing had failed" in out, "drawn again by" in out) == (0, True, False), out
    run("cancel", batch)
    code, out, _ = run("retry", batch)
    told = f"nothing had failed; cancelled: 3, drawn again by: ovis-batch retry {batch} --cancelled\n"
    assert (code, told in out) == (0, True), out
    assert json.loads(run("retry", batch, "--json")[1])["counts"]["cancelled"] == 3
    code, out, _ = run("retry", batch, "--cancelled")
    assert (code, "3 queued" in out, "nothing" in out) == (0, True, False), out
    assert "nothing was cancelled\n" in run("retry", batch, "--cancelled")[1]


def test_the_id_that_openais_door_shows_is_taken_wherever_an_id_is(run: Run) -> None:
    batch = f"batch_{UUID(submitted(run)).hex}"
    for words in (("status",), ("pause",), ("resume",), ("cancel",), ("retry",), ("results",), ("wait",)):
        code, _, err = run(*words, batch, *(("--to", "/dev/null/x") if words == ("results",) else ()))
        assert "Invalid" not in err, err
        assert code in ({2} if words == ("results",) else {0, 1}), err
    assert run("prioritise", batch, "bulk")[0] == 0
    assert run("delete", batch, "-y")[0] == 0
    for wrong in ("batch_", "batch_12", "no-uuid"):
        code, _, err = run("status", wrong)
        assert (code, "no UUID" in err) == (2, True), err


def test_a_job_is_told_from_what_is_not_there(run: Run) -> None:
    job = json.loads(run("submit", "a boat", "--json")[1])["id"]
    for words in (("pause", job), ("resume", job), ("prioritise", job, "bulk"), ("delete", job, "-y")):
        code, _, err = run(*words)
        assert (code, f"{job} is a job: {words[0]} takes a batch" in err) == (2, True), err
    nowhere = "00000000-0000-0000-0000-00000000000a"
    for words in (("status",), ("results",), ("wait",), ("cancel",), ("retry",)):
        code, _, err = run(*words, nowhere)
        assert (code, f"no job or batch {nowhere}" in err) == (4, True), err
    code, _, err = run("pause", nowhere)
    assert (code, f"no batch {nowhere}" in err) == (4, True), err


def test_a_limit_that_is_reached_says_when_to_come_back_and_that_nothing_was_submitted(run: Run) -> None:
    words = ("submit", "-f", "-", "--tenant", "acme")
    assert run("tenants", "set", "acme", "--max-queued", "3")[0] == 0
    assert run(*words, stdin=SMALL)[0] == 0
    code, _, err = run(*words, stdin=SMALL)
    assert (code, "may be submitted" in err) == (2, False), err
    assert re.search(r": come back in [1-9][\d,]* s\n", err), err
    assert run("tenants", "set", "small", "--max-queued", "2")[0] == 0
    code, _, err = run("submit", "-f", "-", "--tenant", "small", stdin=SMALL)
    assert (code, "hand in fewer, or have its limit raised" in err, "come back" in err) == (2, True, False), err


def test_a_dry_run_with_partial_says_that_bad_rows_are_left_out(run: Run) -> None:
    manifest = "prompt,width\na,64\nb,1\n"
    _, out, _ = run("submit", "-f", "-", "--dry-run", "--partial", stdin=manifest)
    assert "bad rows: 1, which are left out" in out, out
    _, out, _ = run("submit", "-f", "-", "--dry-run", stdin=manifest)
    assert "bad rows: 1, with which nothing is submitted without --partial" in out, out


def test_a_file_whose_name_says_no_kind_is_told_the_option(run: Run, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"prompt\na\n")
    code, _, err = run("submit", "-f", str(tmp_path / "page.png"))
    assert (code, "give its kind with --kind" in err) == (2, True), err
    assert run("submit", "-f", str(tmp_path / "page.png"), "--kind", "csv")[0] == 0
