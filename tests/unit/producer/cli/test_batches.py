"""What the commands that steer batches ask before they do what cannot be undone."""

import io
import sys

import pytest
import typer

from producer.cli.batches import _confirm
from producer.jobs.errors import SettingsError


class Interrupted(io.StringIO):
    """A standard input that is no terminal, during whose reading somebody presses Ctrl-C."""

    def readline(self, size: int | None = -1) -> str:
        raise KeyboardInterrupt


def test_ctrl_c_is_no_end_of_input_though_no_terminal_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Interrupted())
    with pytest.raises(typer.Abort):
        _confirm("delete it?")


def test_the_end_of_input_says_that_nobody_is_there_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SettingsError, match="nobody is there to ask: say --yes"):
        _confirm("delete it?")
