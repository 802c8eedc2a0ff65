"""What one image is: the request, its limits and its defaults.

Both sides speak this: a producer validates with it, a worker draws from it. It may know no torch, no queue and
no table. Every accepted value is kept as it was given; nothing is rounded, cut or clamped in silence.
"""

import secrets
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.functional_validators import AfterValidator, BeforeValidator

SIDE_MIN_PX = 64
SIDE_MAX_PX = 2048
SIDE_STEP_PX = 16  # one latent patch: 8 pixels a latent, 2 latents a patch
STEPS_MAX = 100
GUIDANCE_MAX = 20.0
SEED_MAX = 2**63 - 1
GIVEN_SEED_MAX = 2**32 - 1
"""Seeds that are given, not asked for, stay small: a spreadsheet keeps 15 digits and JavaScript 53 bits."""
PROMPT_MAX_CHARACTERS = 8_000
"""Surely too long for the 246 tokens that the real model reads: some 32 characters a token. A producer holds no
tokenizer, so it refuses at this length; a worker, who holds one, refuses the rest by counting tokens."""

TRAINED_ASPECT_MAX = 4.0  # the model card: aspect ratios from 0.25 to 4


class ImageFormat(StrEnum):
    """What the image file is encoded as."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def media_type(self) -> str:
        return f"image/{self.value}"

    @property
    def suffix(self) -> str:
        return "jpg" if self is ImageFormat.JPEG else self.value


def _drawable_text(text: object) -> object:
    """Runs before pydantic's own check, whose words for a surrogate help nobody."""
    if isinstance(text, str):
        if "\x00" in text:
            raise ValueError("holds a NUL character: remove it")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("holds a lone surrogate, which is no character: save the file as UTF-8")
    return text


def _says_something(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("is empty: say what to draw")
    return prompt


def _no_truth_value(value: object) -> object:
    """pydantic takes true for 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = BeforeValidator(_no_truth_value)
Text = Annotated[str, StringConstraints(max_length=PROMPT_MAX_CHARACTERS), BeforeValidator(_drawable_text)]


class ImageRequest(BaseModel):
    """What one image is. Frozen; unknown fields are refused.

    Equal requests with equal seeds give equal images on the same model, revision and device.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: Annotated[Text, AfterValidator(_says_something)] = Field(
        description="What to draw. Put words to be rendered in quotes."
    )
    negative_prompt: Text = Field(default="", description="What to keep away from; used when guidance is above 1.")
    width: Annotated[int, Number] = Field(default=1024, ge=SIDE_MIN_PX, le=SIDE_MAX_PX, description="Pixels.")
    height: Annotated[int, Number] = Field(default=1024, ge=SIDE_MIN_PX, le=SIDE_MAX_PX, description="Pixels.")
    steps: Annotated[int, Number] = Field(default=50, ge=1, le=STEPS_MAX, description="Denoising steps.")
    guidance: Annotated[float, Number] = Field(
        default=5.0,
        ge=0,
        le=GUIDANCE_MAX,
        description="Classifier-free guidance; at or below 1 one branch is drawn.",
    )
    seed: Annotated[int, Number] | None = Field(
        default=None, ge=0, le=SEED_MAX, description="Given at submission if absent."
    )
    format: ImageFormat = Field(default=ImageFormat.PNG)
    quality: Annotated[int, Number] = Field(default=90, ge=1, le=100, description="For jpeg and webp; png is lossless.")

    @property
    def guided(self) -> bool:
        """Whether two branches are drawn (with and without the prompt)."""
        return self.guidance > 1

    @property
    def drawn_size(self) -> tuple[int, int]:
        """(width, height) in pixels that is really drawn: the next multiples of 16, centre-cropped afterwards."""
        return _next_multiple(self.width), _next_multiple(self.height)

    @property
    def work(self) -> float:
        """What drawing it takes, in megapixel-steps: drawn pixels times steps times branches, in millions."""
        width_px, height_px = self.drawn_size
        return width_px * height_px * self.steps * (2 if self.guided else 1) / 1e6

    def seeded(self) -> "ImageRequest":
        """This request with a seed: its own, or one drawn now, so that a retry draws the same picture."""
        if self.seed is not None:
            return self
        return self.model_copy(update={"seed": secrets.randbelow(GIVEN_SEED_MAX + 1)})

    def variants(self, count: int) -> list["ImageRequest"]:
        """``count`` requests that differ in their seed alone: image i has this one's seed + i, beginning again after
        the largest. They are encoded once. The request must have a seed.
        """
        assert self.seed is not None
        return [self.model_copy(update={"seed": (self.seed + i) % (SEED_MAX + 1)}) for i in range(count)]

    def warnings(self) -> list[str]:
        """What a user should know of the result before trusting it, one sentence each."""
        aspect = max(self.width, self.height) / min(self.width, self.height)
        if aspect > TRAINED_ASPECT_MAX:
            return [f"aspect ratio {aspect:.1f}:1 is beyond the 4:1 that the model was trained for"]
        return []


def _next_multiple(side_px: int) -> int:
    return -(-side_px // SIDE_STEP_PX) * SIDE_STEP_PX
