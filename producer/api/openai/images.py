"""``POST /v1/images/generations``: submits, waits for the images, and answers with them."""

import asyncio
import time
from typing import Annotated, Any, TypedDict

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response, StreamingResponse

from pipeline.request import ImageFormat
from producer.api.bodies import JSON, parse, read_document
from producer.api.documents import body_of
from producer.api.openai.documents import errors
from producer.api.openai.errors import StillDrawing, not_drawn
from producer.api.openai.generation import Generation, read_generation
from producer.api.openai.pictures import Pictures
from producer.api.openai.stream import events
from producer.api.openai.waiting import Waiting
from producer.api.parameters import Fingerprint, Key
from producer.api.services import Here, Services
from producer.jobs.contract import Job, Priority, State, SubmissionKey
from producer.jobs.models import Models

TITLE_MAX = 80

router = APIRouter(prefix="/v1/images", tags=["openai"])


class Image(BaseModel):
    """One image: a link, or the file in base64, and the seed that it was drawn from."""

    url: str | None = None
    b64_json: str | None = None
    seed: int


class Images(BaseModel):
    """What was asked for, drawn. There are no tokens to be paid for, and so no ``usage``."""

    created: int
    background: str = "opaque"
    output_format: ImageFormat
    size: str
    data: list[Image]


@router.post(
    "/generations",
    response_model=Images,
    response_model_exclude_none=True,
    openapi_extra=body_of({JSON: "Generation"}),
    responses={200: {"content": {"text/event-stream": {}}}, **errors(400, 404, 413, 500, 504)},
)
async def generate(
    request: Request, body: Annotated[bytes, Depends(read_document)], here: Here, key: Key = None
) -> Response:
    """Draw images, and wait for them. ``X-Request-Id`` is the job's id, or the batch's of several.

    With ``stream`` the answer is server-sent events, as OpenAI's package reads them.
    """
    fingerprint = Fingerprint(request)
    fingerprint.add(body)
    generation, jobs = await run_in_threadpool(_submit, here, body, fingerprint.with_key(key))
    waiting: Waiting = request.app.state.waiting
    headers = {"X-Request-Id": str(jobs[0].batch_id or jobs[0].id)}
    if generation.stream:
        return StreamingResponse(events(generation, jobs[0], here, waiting), 200, headers, "text/event-stream")
    drawn = await _drawn(jobs, here, waiting)
    return JSONResponse(await run_in_threadpool(_answer, generation, drawn, here), 200, headers)


def _submit(here: Services, body: bytes, key: SubmissionKey | None) -> tuple[Generation, list[Job]]:
    """Several images are submitted together, all or none: as a batch."""
    generation, submissions = read_generation(parse(body), Priority.INTERACTIVE)
    if generation.model is not None:
        Models(here.database).model(generation.model)
    facts = _Facts(max_failures=here.settings.max_failures, tenant=here.whose(None), key=key)
    if len(submissions) == 1:
        return generation, [here.store.submit(submissions[0], previews=generation.partial_images, **facts)]
    batch = here.store.submit_batch(_title(generation.prompt), submissions, **facts)
    return generation, here.store.batch_jobs(batch.id)


class _Facts(TypedDict):
    max_failures: int
    tenant: str
    key: SubmissionKey | None


def _title(prompt: str) -> str:
    """The first words, on one line."""
    shown = "".join(character if character.isprintable() else " " for character in prompt)
    return " ".join(shown.split())[:TITLE_MAX] or "images"


async def _drawn(jobs: list[Job], here: Services, waiting: Waiting) -> list[Job]:
    """The jobs, all of which have an image. Raises: StillDrawing, NotDrawn."""
    limit_s = here.settings.image_wait_s
    try:
        async with asyncio.timeout(limit_s):
            await waiting.ended([job.id for job in jobs])
    except TimeoutError:
        raise StillDrawing(jobs, limit_s) from None
    ended = [await run_in_threadpool(here.store.job, job.id) for job in jobs]
    for job in ended:
        if job.state is not State.SUCCEEDED:
            raise not_drawn(job)
    return ended


def _answer(generation: Generation, jobs: list[Job], here: Services) -> dict[str, Any]:
    pictures = Pictures(here.storage)
    width_px, height_px = generation.drawn_size
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": generation.output_format,
        "size": f"{width_px}x{height_px}",
        "data": [pictures.of(job, generation.response_format) for job in jobs],
    }
