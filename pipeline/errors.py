"""Every error that drawing an image can end in, classed by what the caller must do.

PipelineError
├── InvalidRequest      the request can never be drawn: refuse it, never retry
│   └── PromptTooLong   .tokens, .limit
├── CheckpointError     the model cannot be loaded: a person must change a setting
├── DeviceError         the device cannot be used as asked: a person must change a setting
├── Exhausted           the device's memory is too small for this image alone
├── BrokenImage         the numbers became NaN or infinite: this image alone fails
├── UnusableLatents     an unfinished image's bytes are damaged, another model's or engine's: draw it from its start
├── DrawingFailed       torch refused this image for a reason of no other class: it alone fails
├── EngineFull          the engine has no place left: hand the request in again after a step
├── Cancelled           a person or a lost claim took the image out of the engine
├── Drained             the engine stops: the image belongs back in the queue
└── Fatal               the device is dead: end the process

Facts are attributes; nobody has to parse a message.
"""


class PipelineError(Exception):
    """Root of all errors of this package."""


class InvalidRequest(PipelineError):
    """The request can never be drawn as it is. ``field`` names the part that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class PromptTooLong(InvalidRequest):
    """The prompt has more tokens than the model reads; cutting it silently would change its meaning."""

    def __init__(self, field: str, tokens: int, limit: int) -> None:
        super().__init__(field, f"{tokens} tokens, and the model reads {limit} at most: shorten it")
        self.tokens = tokens
        self.limit = limit


class CheckpointError(PipelineError):
    """The folder or hub name holds no Ovis-Image checkpoint that can be loaded."""


class DeviceError(PipelineError):
    """The device does not exist here, has too little memory for the model, or lacks what a setting asks for."""


class Exhausted(PipelineError):
    """The device ran out of memory while it drew this image alone."""

    def __init__(self, width_px: int, height_px: int, message: str) -> None:
        super().__init__(f"{width_px}×{height_px} does not fit the device's memory: {message}")
        self.width_px = width_px
        self.height_px = height_px


class BrokenImage(PipelineError):
    """The image's numbers became NaN or infinite at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"its numbers became NaN or infinite at step {step}")
        self.step = step


class UnusableLatents(PipelineError):
    """The bytes of an unfinished image cannot be gone on with here."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the latents cannot be used: {reason}. Draw the image from its start")


class DrawingFailed(PipelineError):
    """torch refused this image for a reason of no other class; ``__cause__`` is what it said."""


class EngineFull(PipelineError):
    """All of the engine's ``capacity`` places are taken."""

    def __init__(self, capacity: int) -> None:
        super().__init__(f"all {capacity} places of the engine are taken")
        self.capacity = capacity


class Cancelled(PipelineError):
    """The image was taken out of the engine before it was finished."""


class Drained(PipelineError):
    """The engine stops and gives its unfinished images back."""


class Fatal(PipelineError):
    """The device is dead. The process must end: nothing it reports from here on can be trusted."""
