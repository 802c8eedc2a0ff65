"""The peak of a process's memory is seen, and forgotten when asked."""

import platform

import pytest
import torch

from tests.benchmarks.footprint import forget_peak_mib, peak_mib


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux can forget a process's peak")
def test_a_peak_is_seen_after_it_is_over_until_it_is_forgotten() -> None:
    cpu = torch.device("cpu")
    before = forget_peak_mib(cpu)
    torch.ones(64 * 2**20, dtype=torch.uint8).sum()
    assert peak_mib(cpu) - before > 60
    after = forget_peak_mib(cpu)
    assert peak_mib(cpu) - after < 10
