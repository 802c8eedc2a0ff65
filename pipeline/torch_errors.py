"""What an error of torch means for the image that met it.

torch has three classes for what went wrong and a text for the rest, so the texts are read here, and nowhere else.
They are those of torch 2.13, and a test makes torch raise those that need no GPU.
"""

import traceback

import torch

from pipeline.errors import DrawingFailed, Exhausted, Fatal, PipelineError

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    # oneDNN has one text for every refusal. Short of addresses a convolution met it about as often as the allocator's
    # own. What it could not create once it refuses as long as the process lives (tried), so only other shapes help.
    "could not create a primitive",
    "could not execute a primitive",
    # Memory that CUDA's libraries and the driver ask for past torch's allocator, pinned memory among it.
    "CUDA out of memory",  # torch's own, when what it compiled wraps it
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether less at a time may succeed: no memory was there, and nothing is broken.

    On CUDA torch's allocator raises OutOfMemoryError; on a CPU it raises a bare RuntimeError. ``CUDA error: out of
    memory`` comes as AcceleratorError, the class of a dead device, but leaves the context usable.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def classed(error: RuntimeError | MemoryError, width_px: int, height_px: int) -> PipelineError:
    """Exhausted for want of memory, Fatal for a dead device, else DrawingFailed, for an image of that drawn size.

    The caller raises or returns it. The local variables on ``error``'s traceback are let go, lines and names stay:
    an error that somebody keeps must not keep a step's tensors on the device.
    """
    traceback.clear_frames(error.__traceback__)
    message = next(iter(str(error).splitlines()), type(error).__name__)
    classed: PipelineError
    if out_of_memory(error):
        classed = Exhausted(width_px, height_px, message)
    elif isinstance(error, torch.AcceleratorError) or "CUDA error" in message:
        classed = Fatal(f"the device is dead: {message}")
    else:
        classed = DrawingFailed(f"torch could not draw the image: {message}")
    classed.__cause__ = error
    return classed
