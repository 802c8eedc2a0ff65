"""Webhooks from the command line, against the real API."""

from uuid import uuid4

import pytest
from typer.testing import CliRunner

from producer.cli import app
from producer.cli.webhooks import Kind
from producer.client import NotFound
from producer.jobs.contract import EventKind, Submission
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import serving


def test_a_webhook_is_added_shown_and_removed(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["webhooks", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    with serving(settings.model_copy(update={"webhook_private": True})) as url:
        monkeypatch.setenv("OVIS_API_URL", url)
        secret = said("add", "https://127.0.0.1:1/", "--kind", "job.cancelled").strip()
        assert secret.startswith("whsec_")
        line = said("list")
        assert "https://127.0.0.1:1/  job.cancelled  enabled" in line
        assert secret not in line
        webhook = line.split()[0]
        assert said("deliveries", webhook) == ""
        store.cancel(store.submit(Submission(prompt="a"), max_failures=3).id)
        delivery = said("deliveries", webhook)
        assert "job.cancelled" in delivery
        assert delivery.split()[0] == said("resend", webhook, delivery.split()[0]).split()[0]
        assert "enabled" in said("enable", webhook)
        assert CliRunner().invoke(app, ["webhooks", "resend", webhook, str(uuid4())]).exit_code == 2
        said("remove", webhook)
        assert said("list") == ""
        assert said("add", "https://127.0.0.1:1/", "--tenant", "acme").startswith("whsec_")
        assert "https://127.0.0.1:1/  batch.finished of tenant acme  enabled" in said("list")
        with pytest.raises(NotFound):
            said("deliveries", webhook)


def test_only_kinds_that_webhooks_take_are_offered() -> None:
    assert set(Kind) == set(EventKind) - {EventKind.JOB_PROGRESS}
    refused = CliRunner().invoke(app, ["webhooks", "add", "https://127.0.0.1:1/", "--kind", "job.done"])
    assert (refused.exit_code, "'batch.finished'" in refused.output) == (2, True), refused.output
    assert "job.progress" not in refused.output
