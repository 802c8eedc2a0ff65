"""What ``gpu_engine.py`` says without a GPU: its arithmetic, its order of drawing, its verdicts."""

from pathlib import Path

import pytest
import torch
from diffusers import OvisImageTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.planner import Candidate
from pipeline.prompt import TEXT_TOKENS
from tests.benchmarks.full_size import FULL, SMALL, forward_flop
from tests.benchmarks.gpu_engine import rows
from tests.benchmarks.gpu_report import Report, targets
from tests.benchmarks.gpu_scene import SMALL_SCENE, WHOLE_SCENE, Scene
from tests.benchmarks.timed_steps import InTurn, psnr_db


@pytest.fixture(scope="module")
def full() -> OvisImageTransformer2DModel:
    """The 7B architecture without its weights."""
    with torch.device("meta"):
        return OvisImageTransformer2DModel(**FULL.transformer)


@pytest.mark.parametrize(
    ("width_px", "height_px", "tflop"),
    [(1024, 1024, 51.1), (512, 512, 13.4), (640, 1536, 47.6), (256, 976, 12.9), (96, 736, 5.4)],
)
def test_a_forward_has_the_operations_that_the_models_facts_name(
    full: OvisImageTransformer2DModel, width_px: int, height_px: int, tflop: float
) -> None:
    counted = forward_flop(full, width_px * height_px // 256)
    assert round(counted / 1e12, 1) == tflop


def test_a_forward_has_the_operations_that_torch_counts_in_it_but_for_what_depends_on_the_timestep_alone() -> None:
    transformer = OvisImageTransformer2DModel(**SMALL.transformer).eval()
    config, rows, columns = transformer.config, 4, 6
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(
            hidden_states=torch.randn(1, rows * columns, config.in_channels),
            encoder_hidden_states=torch.randn(1, TEXT_TOKENS, config.joint_attention_dim),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(rows * columns, 3),
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
        )
    of_the_timestep = sum(
        2 * module.weight.numel()
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and ("norm" in name or "timestep" in name)
    )
    assert counter.get_total_flops() - of_the_timestep == forward_flop(transformer, rows * columns)


def test_the_full_architecture_has_the_models_parameters(full: OvisImageTransformer2DModel) -> None:
    assert round(sum(one.numel() for one in full.parameters()) / 1e9, 2) == 7.37


def test_every_image_draws_once_a_round_in_packs_within_the_budget() -> None:
    images = [Candidate(ticket, tokens, steps_left=9) for ticket, tokens in enumerate((500, 90, 40, 60))]
    planner = InTurn(100)
    packs = [planner.pick(images)]
    while not planner.round_over:
        packs.append(planner.pick(images))
    assert packs == [[2, 3], [1], [0]], "small ones first; the last is over the budget, and so alone"


def test_no_two_rows_have_one_name_for_targets_find_them_by_it() -> None:
    names = [row.name for row in rows(WHOLE_SCENE)]
    assert len(set(names)) == len(names)


def test_every_target_names_rows_that_are_measured() -> None:
    measured = [
        {
            "row": row.name,
            "status": "done",
            "seconds_an_image": 1.0,
            "share_of_ceiling": 0.9,
            "peak_gb_with_decoding": 1.0,
            "ratio_at_its_own_pace": 1.0,
            "ratio_without_a_pause": 1.0,
        }
        for row in rows(WHOLE_SCENE)
    ]
    verdicts = {one["target"]: one["reached"] for one in targets(WHOLE_SCENE, measured)}
    assert verdicts.pop("1024²: times as fast as diffusers eager") == "no"
    assert set(verdicts.values()) == {"yes"}


def test_a_target_whose_row_failed_is_open() -> None:
    failed = [{"row": row.name, "status": "failed", "reason": "no memory"} for row in rows(WHOLE_SCENE)]
    assert {one["reached"] for one in targets(WHOLE_SCENE, failed)} == {"open"}


@pytest.mark.parametrize(
    ("scene", "compiled", "judged"),
    [(WHOLE_SCENE, True, True), (SMALL_SCENE, True, False), (WHOLE_SCENE, False, False)],
)
def test_a_report_judges_and_names_only_what_was_measured(
    scene: Scene, compiled: bool, judged: bool, tmp_path: Path
) -> None:
    report = Report(tmp_path, {"compiled": compiled}, scene)
    report.add({"row": rows(scene)[2].name, "status": "failed", "reason": "no memory", "elapsed_s": 1.0})
    report.add({"row": "parity", "status": "done", "engine compiled: PSNR": "9 dB", "elapsed_s": 2.0})
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert ("target" in table) == judged
    assert ("- engine compiled; " in table, "engine compiled: PSNR" in table) == (compiled, compiled)
    assert ("- engine not compiled; " in table, "engine not compiled: PSNR" in table) == (not compiled, not compiled)


def test_all_rows_together_fit_into_nine_minutes() -> None:
    assert sum(row.about_s for row in rows(WHOLE_SCENE)) <= 9 * 60


def test_the_psnr_of_latents_takes_their_range_for_the_peak() -> None:
    reference = torch.tensor([0.0, 10.0])
    assert psnr_db(reference, reference + 1.0) == pytest.approx(20.0)
