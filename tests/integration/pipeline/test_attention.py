"""Attention inside each of many sequences: what one call for each of them gives. On CUDA see ``tests/gpu``."""

from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.attention import Attention, Heads, Spans, by_groups

CPU = torch.device("cpu")
HEADS, WIDTH = 3, 16
MIXES = [(40,), (40, 40, 40), (40, 50, 60), (40, 40, 50, 40), (1, 300, 1, 1), (50, 50, 40, 40)]


def heads_of(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> Heads:
    """Queries, keys and values, each [T, H, d]."""
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = torch.randn(3, sum(lengths), HEADS, WIDTH, generator=generator).to(dtype)
    return queries, keys, values


def one_by_one(heads: Heads, lengths: Sequence[int]) -> torch.Tensor:
    """Each sequence by a call of its own, [T, H · d]."""
    attended = [
        scaled_dot_product_attention(*(one[None].transpose(1, 2) for one in sequence))[0].transpose(0, 1).flatten(1)
        for sequence in zip(*(one.split(list(lengths)) for one in heads), strict=True)
    ]
    return torch.cat(attended)


@pytest.mark.parametrize("lengths", MIXES, ids=str)
def test_groups_give_what_each_sequence_gives_alone(lengths: tuple[int, ...]) -> None:
    heads = heads_of(lengths)
    attended = by_groups(heads, Spans(lengths, CPU))
    assert attended.shape == (sum(lengths), HEADS * WIDTH)
    torch.testing.assert_close(attended, one_by_one(heads, lengths), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", MIXES, ids=str)
def test_groups_give_the_same_bits_on_a_cpu(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    heads = heads_of(lengths, dtype)
    assert torch.equal(by_groups(heads, Spans(lengths, CPU)), one_by_one(heads, lengths))


@pytest.mark.parametrize("lengths", [mix for mix in MIXES if len(mix) > 1], ids=str)
def test_a_sequence_sees_nothing_of_its_neighbours(lengths: tuple[int, ...]) -> None:
    heads = heads_of(lengths)
    before = by_groups(heads, Spans(lengths, CPU))
    for one in heads:
        one[: lengths[0]] = float("nan")
    after = by_groups(heads, Spans(lengths, CPU))
    assert after[: lengths[0]].isnan().all()
    assert torch.equal(after[lengths[0] :], before[lengths[0] :])


@pytest.mark.parametrize("lengths", MIXES, ids=str)
def test_spans_say_where_each_sequence_starts_and_which_neighbours_are_equal(lengths: tuple[int, ...]) -> None:
    spans = Spans(lengths, CPU)
    assert spans.starts.dtype == torch.int32
    assert spans.starts.diff().tolist() == list(lengths)
    assert [length for sequences, length in spans.groups for _ in range(sequences)] == list(lengths)
    neighbours = zip(spans.groups, spans.groups[1:], strict=False)
    assert all(one != other for (_, one), (_, other) in neighbours)
    assert spans.are_equal == (min(lengths) == max(lengths))


def test_on_a_cpu_there_is_one_way_and_nothing_to_measure() -> None:
    attention, heads = Attention(), heads_of((40, 50))
    before = attention(heads, Spans((40, 50), CPU))
    assert attention.measure(HEADS, WIDTH, CPU, torch.bfloat16) == {}
    assert torch.equal(attention(heads, Spans((40, 50), CPU)), before)
    assert torch.equal(before, by_groups(heads, Spans((40, 50), CPU)))
