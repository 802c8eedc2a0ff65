"""The client that waits is what ``make client`` makes of the one that is awaited."""

from pathlib import Path

from tests.sync_client import CLIENT, write


def test_the_client_that_waits_is_up_to_date(tmp_path: Path) -> None:
    write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    there = {path.name: path.read_text() for path in (CLIENT / "_sync").glob("*.py")}
    assert there == made, "run `make client`"
    assert "class Client(" in made["client.py"]
    assert not any(word in text for text in made.values() for word in ("async def", "await ", "aclose", "_async("))
