"""What the commands of those who want images say."""

from producer.cli import jobs
from producer.client import Farm, Worker


def test_a_worker_that_draws_in_8_bits_says_so_in_the_farms_table() -> None:
    worker = Worker.model_construct(
        host="h",
        pid=1,
        device="cuda:0",
        model="ovis",
        revision="sha256-1+fp8",
        drawing=[],
        heartbeat_age_s=1,
        live=True,
    )
    table = jobs._farm_table(Farm.model_construct(counts={}, workers=[worker]))
    assert list(table.columns[2].cells) == ["ovis+fp8"]
