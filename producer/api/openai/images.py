"""``POST /v1/images/generations``: submits, waits for the images, and answers with them."""

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response, StreamingResponse

from pipeline.request import ImageFormat
from producer.api.answers import PREFIX
from producer.api.bodies import JSON, parse, read_document
from producer.api.documents import body_of
from producer.api.openai.documents import errors
from producer.api.openai.errors import StillDrawing, not_drawn, paths_of, submitted
from producer.api.openai.generation import Generation, read_generation
from producer.api.openai.models import promised
from producer.api.openai.pictures import Pictures, Usage
from producer.api.openai.stream import events
from producer.api.openai.waiting import Waiting
from producer.api.parameters import Fingerprint, Key
from producer.api.services import Here, Services
from producer.jobs.contract import Job, Priority, State, SubmissionKey

TITLE_MAX = 80

router = APIRouter(prefix="/v1/images", tags=["openai"])


class Image(BaseModel):
    """One image: a link, or the file in base64, and the seed that it was drawn from."""

    url: str | None = None
    b64_json: str | None = None
    seed: int


class Images(BaseModel):
    """What was asked for, drawn."""

    created: int
    background: str = "opaque"
    output_format: ImageFormat
    size: str
    data: list[Image]
    usage: Usage = Usage()


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

    No job is drawn by a model that was chosen: whichever worker is free draws it. So ``model`` may be given while all
    workers have the same one, and is checked when this is asked.
    """
    fingerprint = Fingerprint(request)
    fingerprint.add(body)
    generation, jobs = await run_in_threadpool(_submit, here, body, fingerprint.with_key(key))
    waiting: Waiting = request.app.state.waiting
    headers = {"X-Request-Id": str(jobs[0].batch_id or jobs[0].id)}
    if generation.stream:
        return StreamingResponse(events(generation, jobs[0], here, waiting), 200, headers, "text/event-stream")
    with submitted(*paths_of(jobs)):
        await _ended(jobs, here, waiting)
        run = run_in_threadpool if generation.response_format == "url" else here.transfers.begin
        return await run(_answer, generation, jobs, here, headers)


def _submit(here: Services, body: bytes, key: SubmissionKey | None) -> tuple[Generation, list[Job]]:
    """Several images are submitted together, all or none: as a batch."""
    generation, submissions = read_generation(parse(body), Priority.INTERACTIVE)
    if generation.model is not None:
        promised(generation.model, here.database)
    most, tenant, previews = here.settings.max_failures, here.whose(None), generation.partial_images
    if len(submissions) == 1:
        job = here.store.submit(submissions[0], max_failures=most, tenant=tenant, key=key, previews=previews)
        return generation, [job]
    title = _title(generation.prompt)
    batch = here.store.submit_batch(title, submissions, max_failures=most, tenant=tenant, key=key)
    with submitted(f"{PREFIX}/batches/{batch.id}"):
        return generation, here.store.batch_jobs(batch.id)


def _title(prompt: str) -> str:
    """The first words, on one line."""
    shown = "".join(character if character.isprintable() else " " for character in prompt)
    return " ".join(shown.split())[:TITLE_MAX] or "images"


async def _ended(jobs: list[Job], here: Services, waiting: Waiting) -> None:
    """Return when all of them have ended. Raises: StillDrawing, NotFound."""
    limit_s = here.settings.image_wait_s
    try:
        async with asyncio.timeout(limit_s):
            await waiting.ended([job.id for job in jobs])
    except TimeoutError:
        raise StillDrawing(jobs, limit_s) from None


def _answer(generation: Generation, jobs: list[Job], here: Services, headers: dict[str, str]) -> Response:
    """The images of jobs that have ended. Raises: NotDrawn, NotFound, Unavailable."""
    ended = [here.store.job(job.id) for job in jobs]
    for job in ended:
        if job.state is not State.SUCCEEDED:
            raise not_drawn(job)
    pictures = Pictures(here.storage)
    width_px, height_px = generation.drawn_size
    content = {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": generation.output_format,
        "size": f"{width_px}x{height_px}",
        "data": [pictures.of(job, generation.response_format) for job in ended],
        "usage": Usage().model_dump(),
    }
    return JSONResponse(content, 200, headers)
