"""What ``gpu_engine.py`` draws, with what, and by whom: the scene, and the bench on which it is measured."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import OvisImagePipeline

from pipeline.model import Model
from pipeline.prompt import TEXT_TOKENS
from pipeline.quiet import quiet
from pipeline.request import ImageRequest
from pipeline.transformer import PackedTransformer
from tests.benchmarks.full_size import FULL, SMALL, Architecture, build_model, twin
from tests.benchmarks.timed_steps import STEPS, Amounts

BUDGETS = (8192, 16384)
BF16, FP8, LOW_MEMORY = "bf16", "fp8", "low memory"
ENGINE, ENGINE_EAGER = "engine compiled", "engine eager"
DIFFUSERS, DIFFUSERS_EAGER = "diffusers compiled", "diffusers eager"


@dataclass(frozen=True)
class Scene:
    """What is drawn, and how much of it."""

    architecture: Architecture
    square: ImageRequest
    half: ImageRequest
    banner: ImageRequest
    mixed: list[ImageRequest]
    budgets: tuple[int, ...]
    amounts: Amounts
    parity_steps: int
    beside: tuple[int, int]  # rounds, and steps in each
    repeats: int  # of everything that is no step
    matrix: int  # side of the ceiling's square matrices

    @property
    def singles(self) -> tuple[ImageRequest, ImageRequest, ImageRequest]:
        return self.square, self.half, self.banner


def _request(width_px: int, height_px: int, guidance: float = 5.0) -> ImageRequest:
    prompt = 'A shop window with the words "OPEN LATE"'
    return ImageRequest(prompt=prompt, width=width_px, height=height_px, guidance=guidance, steps=STEPS, seed=0)


def _mix(sizes_px: Sequence[tuple[int, int]]) -> list[ImageRequest]:
    """Each size twice: guided, and then one in three without guidance."""
    guided = [_request(*size_px) for size_px in sizes_px]
    return [*guided, *(_request(*size_px, (1.0, 3.5, 7.0)[number % 3]) for number, size_px in enumerate(sizes_px))]


WHOLE_SCENE = Scene(
    FULL,
    square=_request(1024, 1024),
    half=_request(512, 512),
    banner=_request(736, 96),
    mixed=_mix([(300, 250), (728, 90), (160, 600), (970, 250), (512, 512), (1536, 640)]),
    budgets=BUDGETS,
    amounts=Amounts(warm_up=3, timed=10),
    parity_steps=10,
    beside=(3, 5),
    repeats=5,
    matrix=8192,
)
SMALL_SCENE = Scene(
    SMALL,
    square=_request(96, 96),
    half=_request(64, 64),
    banner=_request(160, 64),
    mixed=_mix([(100, 70), (64, 64)]),
    budgets=(1200, 1800),
    amounts=Amounts(warm_up=1, timed=2),
    parity_steps=2,
    beside=(1, 1),
    repeats=1,
    matrix=256,
)


class Bench:
    """The model that is loaded at the moment, and who draws with it. One model at a time, for the peak's sake."""

    def __init__(self, scene: Scene, device: torch.device) -> None:
        self.scene = scene
        self.device = device
        self.ceiling_tflop_per_s: float | None = None
        self.bf16_latents: torch.Tensor | None = None  # of the square image, to compare fp8's with
        self._variant = ""
        self._model: Model | None = None
        self._packed: dict[bool, PackedTransformer] = {}
        self._pipelines: dict[bool, OvisImagePipeline] = {}
        self.ways: dict[bool, dict[str, dict[str, float]]] = {}

    @property
    def model(self) -> Model:
        assert self._model is not None
        return self._model

    def load(self, variant: str) -> None:
        """Build the model of ``variant``, and let the one before it go."""
        if variant == self._variant:
            return
        self._variant, self._model = "", None
        self._packed.clear()
        self._pipelines.clear()
        torch._dynamo.reset()
        self.tidy()
        self._model = build_model(
            self.scene.architecture, self.device, fp8=variant == FP8, low_memory=variant == LOW_MEMORY
        )
        self._variant = variant

    def packed(self, *, compiled: bool) -> PackedTransformer:
        """The engine's forward, its ways of attention measured."""
        if compiled not in self._packed:
            model = self.model
            packed = PackedTransformer(model.transformer, model.modulations, compiled=compiled)
            self.ways[compiled] = packed.choose_attention()
            self._packed[compiled] = packed
        return self._packed[compiled]

    def pipeline(self, *, compiled: bool) -> OvisImagePipeline:
        """diffusers' own, on the same weights."""
        # The engine's forward lays weights side by side: a twin that was made before would keep the old ones alive.
        self.packed(compiled=False)
        if compiled not in self._pipelines:
            self._pipelines[compiled] = _pipeline(self.model, compiled=compiled)
        return self._pipelines[compiled]

    def tidy(self) -> None:
        """Give memory back that nobody holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _pipeline(model: Model, *, compiled: bool) -> OvisImagePipeline:
    transformer = model.transformer
    if compiled:
        transformer = twin(transformer)
        # The first size is compiled for itself; with the second torch compiles once more, for every size.
        transformer.compile_repeated_blocks(fullgraph=True)
    with quiet():
        pipeline = OvisImagePipeline(
            scheduler=type(model.scheduler).from_config(model.scheduler.config),
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            transformer=transformer,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokens(request: ImageRequest) -> int:
    """What the engine's budget counts, of one image."""
    width_px, height_px = request.drawn_size
    return (1 + request.guided) * (TEXT_TOKENS + width_px * height_px // 256)


def size_of(requests: Sequence[ImageRequest]) -> str:
    """What a set of images is called."""
    sizes = {f"{request.width}×{request.height}" for request in requests}
    return sizes.pop() if len(sizes) == 1 else "mixed banners"
