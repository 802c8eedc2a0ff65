"""An image on its way as server-sent events: what the ``openai`` package knows as ``image_generation.partial_image``
and ``image_generation.completed``.

A partial image is the last preview that a worker has left in the bucket when somebody looks; one that is replaced
before that is never sent, so there may be fewer than were asked for. Errors are an event too: the status has long been
sent. The bucket is read in the places that downloads have, one piece each: see ``places``.
"""

import json
import logging
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

from pipeline.request import ImageFormat
from producer.api.openai.errors import NotDrawn, StillDrawing, Unanswered, error, not_drawn, paths_of, submitted
from producer.api.openai.generation import AUTO, Generation
from producer.api.openai.pictures import Usage
from producer.api.openai.waiting import Waiting
from producer.api.services import Services
from producer.jobs.contract import Job, State
from producer.jobs.errors import NotFound

log = logging.getLogger(__name__)

PREVIEW_FORMAT = ImageFormat.JPEG
"""Of previews, whatever the image will be: ``worker.previews``."""
ALIVE_S = 15
"""A comment is sent when there was nothing else to say for so long, so that nobody in between takes it for dead."""


async def events(generation: Generation, job: Job, here: Services, waiting: Waiting) -> AsyncIterator[bytes]:
    """The events of one image, the last of them the image or an error."""
    try:
        with submitted(*paths_of([job])):
            async for event in _drawing(generation, job, here, waiting):
                yield event
    except StillDrawing as late:
        yield _failure(late, 504, "still_drawing")
    except NotDrawn as failed:
        yield _failure(failed, 500, "not_drawn")
    except (Unanswered, NotFound) as away:
        log.warning("job %s: its stream ended: %s", job.id, away)
        yield _failure(away, 503, "unavailable")


async def _drawing(generation: Generation, job: Job, here: Services, waiting: Waiting) -> AsyncIterator[bytes]:
    """Raises: StillDrawing, NotDrawn, NotFound, Unavailable."""
    limit_s = here.settings.image_wait_s
    deadline = time.monotonic() + limit_s
    shown: list[str] = []
    with waiting.seat(job.id) as seat:
        while True:
            try:
                standing = await seat.change(min(ALIVE_S, max(0, deadline - time.monotonic())))
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise StillDrawing([job], limit_s) from None
                yield b": it is still being drawn\n\n"
                continue
            if standing.state.terminal:
                yield await here.transfers.go_on(_completed, generation, job, here)
                return
            if standing.preview_key and standing.preview_key not in shown and len(shown) < generation.partial_images:
                preview = await here.transfers.go_on(_preview, here, standing.preview_key)
                if preview is not None:
                    partial = {"partial_image_index": len(shown), "output_format": PREVIEW_FORMAT}
                    yield _event("image_generation.partial_image", generation, preview, **partial)
                    shown.append(standing.preview_key)


def _completed(generation: Generation, job: Job, here: Services) -> bytes:
    ended = here.store.job(job.id)
    if ended.state is not State.SUCCEEDED or ended.object_key is None:
        raise not_drawn(ended)
    image = here.storage.get(ended.object_key)
    return _event("image_generation.completed", generation, image, usage=Usage().model_dump())


def _preview(here: Services, key: str) -> bytes | None:
    """None: another has taken its place, or the image."""
    try:
        return here.storage.get(key)
    except NotFound:
        return None


def _event(kind: str, generation: Generation, image: bytes, **more: Any) -> bytes:
    width_px, height_px = generation.drawn_size
    data = {
        "type": kind,
        "b64_json": b64encode(image).decode(),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": generation.output_format,
        "quality": AUTO,
        "size": f"{width_px}x{height_px}",
        **more,
    }
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _failure(failed: Exception, status: int, code: str) -> bytes:
    return f"event: error\ndata: {json.dumps({'error': error(str(failed), status, code=code)})}\n\n".encode()
