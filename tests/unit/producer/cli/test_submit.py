"""What the command that submits says."""

from pathlib import Path
from typing import Any

import pytest

from producer.cli.submit import submit
from producer.client import Client, Job, Overloaded, Problem, Refused, ServerError, Unreachable
from producer.jobs.errors import SettingsError


def _problem(status: int) -> Problem:
    return Problem(type="about:blank", title="no", status=status, detail="no")


@pytest.mark.parametrize(
    ("end", "known"),
    [
        (Unreachable("http://farm", "lost", heard=True), False),
        (Unreachable("http://farm", "away", heard=False), True),
        (ServerError(_problem(500)), False),
        (Overloaded(_problem(429), 60), True),
        (Overloaded(_problem(429), 60, perhaps_done=True), False),
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
    monkeypatch.setattr(Client, "submit_manifest", lose)
    manifest = tmp_path / "m.csv"
    manifest.write_text("prompt\ngood\n")
    for what in ({"prompt": "a boat"}, {"file": manifest}):
        with pytest.raises(type(end)):
            submit(**what)
        assert (f"--key {keys[-1]} " in capsys.readouterr().err) == (not known)
    assert keys[0] != keys[1]


@pytest.mark.parametrize("option", [{"template": "{a}"}, {"vary": ["seed=1..2"]}, {"dry_run": True}, {"weight": 2.0}])
def test_options_of_manifests_do_not_go_with_a_prompt(option: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="goes with a manifest: give --file"):
        submit("a boat", **option)


def test_a_size_that_is_too_small_to_be_drawn_says_how_it_is_had_all_the_same() -> None:
    with pytest.raises(SettingsError, match="draw 640x100 and scale it down to 320x50"):
        submit("a boat", width=320, height=50)
    with pytest.raises(SettingsError, match="draw 2048x100 and scale it down to 1024x50"):
        submit("a boat", height=50)
    with pytest.raises(SettingsError) as beyond:
        submit("a boat", width=3000)
    assert "draw" not in str(beyond.value)


@pytest.mark.parametrize("option", ["key", "tenant"])
def test_what_the_terminal_gave_as_no_text_is_a_wrong_option(option: str) -> None:
    options: dict[str, Any] = {option: "\udcff"}
    with pytest.raises(SettingsError, match=f"--{option} is no UTF-8"):
        submit("a boat", **options)
