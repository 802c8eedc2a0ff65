"""How the command line ends: its exit codes, and what it says of an error."""

import pytest

from producer import cli
from producer.client import ClientError, Overloaded, Problem, Refused, ServerError, Unreachable
from producer.jobs.errors import SettingsError, Unavailable


def problem(status: int) -> Problem:
    return Problem(type="about:blank", title="away", status=status, detail="S3")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (SettingsError("set it"), 2, "set it"),
        (Unavailable("Postgres", "connection refused"), 3, "check OVIS_DATABASE_URL"),
        (Unreachable("http://farm", "connection refused"), 3, "http://farm"),
        (ServerError(problem(503)), 3, "away (503): S3"),
        (Refused(problem(409)), 2, "away (409): S3"),
        (Overloaded(problem(429), 3600), 2, "away (429): S3: come back in 3,600 s"),
        (ClientError("corrupt"), 2, "corrupt"),
    ],
)
def test_an_error_ends_with_its_exit_code_and_says_what_to_do(
    error: Exception, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*, standalone_mode: bool) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert told in capsys.readouterr().err
