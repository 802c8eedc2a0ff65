"""What is installed holds all that the code reads."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("migrations", "pipeline", "producer", "worker")
PICTURES = {ROOT / "producer" / "dashboard" / "page.png"}
"""README's own."""


def test_every_file_beside_the_code_is_package_data() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {file for package, globs in declared.items() for glob in globs for file in _within(package).glob(glob)}
    there = {file for package in PACKAGES for file in _within(package).rglob("*")}
    beside = {file for file in there if file.is_file() and file.suffix not in {".py", ".pyc"}} - PICTURES
    assert beside, "nothing was looked at"
    assert beside <= packed


def _within(package: str) -> Path:
    return ROOT.joinpath(*package.split("."))
