"""The body of an image request in OpenAI's words, and the jobs that it asks for.

What OpenAI has and this farm has not is refused, unless leaving it out changes no picture: nobody is told that an image
is transparent, or was filtered, when it is not.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.request import GUIDANCE_MAX, SEED_MAX, STEPS_MAX, ImageFormat, Number
from producer.api.errors import Fault, Invalid
from producer.api.problems import faults_of
from producer.jobs.contract import Priority, Submission

IMAGES_MAX = 10
PARTIAL_IMAGES_MAX = 3
AUTO: Literal["auto"] = "auto"
AUTO_SIZE = "1024x1024"
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)

_SIDES = ("width", "height")
"""Fields of a request that are one here: ``size``."""


def _size(size: str) -> str:
    if size != AUTO and not SIZE.fullmatch(size):
        raise ValueError('must be "auto", or width and height in pixels, for example "1024x1024"')
    return size


class Generation(BaseModel):
    """``POST /v1/images/generations``. Null is as good as absent, as OpenAI's package has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(default=None, description="That of /v1/models, if it is the only one; absent: any.")
    n: Annotated[int, Number] = Field(
        default=1, ge=1, le=IMAGES_MAX, description="Images; with a seed, each of the next has one more."
    )
    size: Annotated[str, AfterValidator(_size)] = Field(default=AUTO, description="'1024x1024'; 'auto' is that too.")
    output_format: ImageFormat = ImageFormat.PNG
    output_compression: Annotated[int, Number] | None = Field(
        default=None, ge=1, le=100, description="Quality of jpeg and webp; absent: 100."
    )
    response_format: Literal["url", "b64_json"] = "url"
    stream: bool = Field(default=False, description="Server-sent events: partial images, and the image.")
    partial_images: Annotated[int, Number] = Field(
        default=0, ge=0, le=PARTIAL_IMAGES_MAX, description="With stream: how many."
    )
    seed: Annotated[int, Number] | None = Field(default=None, ge=0, le=SEED_MAX)
    num_inference_steps: Annotated[int, Number] = Field(default=50, ge=1, le=STEPS_MAX)
    guidance_scale: Annotated[float, Number] = Field(default=5.0, ge=0, le=GUIDANCE_MAX)
    negative_prompt: str = ""
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] = Field(
        default=AUTO, description="Means nothing: num_inference_steps is what changes it."
    )
    background: Literal["auto", "opaque"] = Field(default=AUTO, description="Images are opaque.")
    moderation: Literal["auto", "low"] = Field(default=AUTO, description="Means nothing: there is none.")
    user: str | None = Field(default=None, description="Means nothing.")
    safety_identifier: str | None = Field(default=None, description="Means nothing.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.output_compression is not None and self.output_format is ImageFormat.PNG:
            raise ValueError("output_compression is for jpeg and webp: png loses nothing")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images come with stream alone")
        if self.stream and self.n > 1:
            raise ValueError("stream gives one image: leave n at 1")
        return self

    def submissions(self, priority: Priority = Priority.STANDARD) -> list[Submission]:
        """One for each image, each with its seed. Raises: ValidationError: of the size, or a prompt."""
        width, height = self.drawn_size
        asked = Submission(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            seed=self.seed,
            format=self.output_format,
            quality=self._quality,
            priority=priority,
        )
        variants = asked.request().variants(self.n)
        return [asked.model_copy(update={"seed": variant.seed}) for variant in variants]

    @property
    def _quality(self) -> int:
        """Of png, which has none, what any request has: equal images have equal requests."""
        if self.output_format is ImageFormat.PNG:
            return int(Submission.model_fields["quality"].default)
        return self.output_compression or 100

    @property
    def drawn_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        found = SIZE.fullmatch(AUTO_SIZE if self.size == AUTO else self.size)
        assert found is not None
        return int(found[1]), int(found[2])


def read_generation(value: Any, priority: Priority = Priority.STANDARD) -> tuple[Generation, list[Submission]]:
    """The request, and the jobs that it asks for. Raises: Invalid: its faults, by OpenAI's names of the fields."""
    try:
        generation = Generation.model_validate(value)
        return generation, generation.submissions(priority)
    except ValidationError as error:
        raise Invalid(_renamed(_faults(error))) from None


def body_of(submission: dict[str, Any]) -> dict[str, Any]:
    """The body that asks for this request once more: the same image."""
    body = {
        "prompt": submission["prompt"],
        "size": f"{submission['width']}x{submission['height']}",
        "num_inference_steps": submission["steps"],
        "guidance_scale": submission["guidance"],
        "seed": submission["seed"],
        "output_format": submission["format"],
    }
    if submission["negative_prompt"]:
        body["negative_prompt"] = submission["negative_prompt"]
    if submission["format"] != ImageFormat.PNG:
        body["output_compression"] = submission["quality"]
    return body


def _faults(error: ValidationError) -> list[Fault]:
    return faults_of(error.errors(include_url=False, include_input=False, include_context=False))


def _renamed(faults: list[Fault]) -> list[Fault]:
    """By OpenAI's names of the fields; what is wrong with both sides of a size is told once.

    NUL, which a name of an unknown field may hold, is what Postgres keeps in no text.
    """
    sides: dict[str, list[str]] = {}
    for fault in faults:
        if fault.field in _SIDES:
            sides.setdefault(fault.message, []).append(fault.field)
    sizes = [Fault(field="size", message=f"{' and '.join(names)}: {message}") for message, names in sides.items()]
    others = [fault for fault in faults if fault.field not in _SIDES]
    return sizes + [fault.model_copy(update={"field": fault.field.replace("\x00", "\\x00")}) for fault in others]
