"""The words that the client's arguments take are those that the farm knows."""

from typing import Any, get_args

import pytest

from producer import client, manifest
from producer.jobs import contract, search

KNOWN: list[tuple[Any, set[str]]] = [
    (client.State, set(contract.State)),
    (client.RetriedState, set(contract.RETRIED)),
    (client.Priority, set(contract.Priority)),
    (client.Scope, set(contract.Scope)),
    (client.Sort, set(search.Sort)),
    (client.ManifestKind, set(manifest.ManifestKind)),
    (client.WebhookKind, set(contract.EventKind) - {contract.EventKind.JOB_PROGRESS}),
]


@pytest.mark.parametrize(("said", "known"), KNOWN)
def test_every_word_is_one_that_the_farm_knows_and_none_is_missing(said: Any, known: set[str]) -> None:
    assert set(get_args(said)) == known
