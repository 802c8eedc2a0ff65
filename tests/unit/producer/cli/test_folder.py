"""Whose folder it is."""

from pathlib import Path

import pytest

from producer.cli.farm import DEMO
from producer.cli.folder import MARKER, claim_folder
from producer.jobs.errors import SettingsError


def test_a_demo_fills_its_folder_again_and_never_a_batchs(tmp_path: Path) -> None:
    for _ in range(2):
        claim_folder(tmp_path / "demo", DEMO)
    claim_folder(tmp_path / "mine", "batch 1")
    with pytest.raises(SettingsError, match="results of batch 1"):
        claim_folder(tmp_path / "mine", DEMO)
    with pytest.raises(SettingsError, match="results of the demo"):
        claim_folder(tmp_path / "demo", "batch 1")


def test_a_folder_whose_marker_was_not_written_to_its_end_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / MARKER).touch()
    claim_folder(tmp_path, "batch 1")
    assert (tmp_path / MARKER).read_text() == "batch 1\n"
