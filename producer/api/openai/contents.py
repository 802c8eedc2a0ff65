"""What stands in the files of batches: input, output and errors, each line written from rows when it is read.

Where the input was OpenAI's, there is one line of output for each of its lines, whatever number of images that asked
for: in the output file if all of them are there, and in the error file otherwise. A batch that came in another way has
one line for each of its jobs, in its input file, too: a row of a manifest may have become many jobs, and what its
columns are called means nothing here. No more than one page of rows and one image is in memory.
"""

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from heapq import merge
from itertools import groupby
from typing import Any, Literal, NamedTuple

from producer.api.openai.errors import error, fault_of
from producer.api.openai.generation import body_of
from producer.api.openai.identifiers import Part
from producer.api.openai.pictures import Pictures, Usage
from producer.jobs.contract import Batch, Job, Rejection, State
from producer.jobs.store import Store

Endpoint = Literal["/v1/images/generations"]
ENDPOINT: Endpoint = "/v1/images/generations"
Method = Literal["POST"]
METHOD: Method = "POST"
PAGE = 250
"""Rows that are in memory at once: each holds what its line held."""
PIECE_BYTES = 65_536


class Content(NamedTuple):
    """Writes a batch's files."""

    batch: Batch
    store: Store
    pictures: Pictures

    def of(self, part: Part) -> Generator[bytes, None, None]:
        """The file in pieces. Raises: Unavailable, in its midst too."""
        write: dict[Part, Callable[[], Iterator[bytes]]] = {
            Part.INPUT: self._input,
            Part.OUTPUT: self._output,
            Part.ERRORS: self._errors,
        }
        return _in_pieces(write[part]())

    def _input(self) -> Iterator[bytes]:
        for job in self._jobs():
            request = body_of(job.request.model_dump(mode="json"))
            yield _line({"custom_id": _custom_id(job), "method": METHOD, "url": ENDPOINT, "body": request})

    def _output(self) -> Iterator[bytes]:
        for jobs in self._lines():
            if _good(jobs):
                yield from self._drawn(jobs)

    def _errors(self) -> Iterator[bytes]:
        """In the order of the input."""
        failed = ((_number(jobs[0]), _failed(jobs)) for jobs in self._lines() if not _good(jobs))
        rejected = ((rejection.line, _rejected(rejection)) for rejection in self._rejections())
        for _, document in merge(failed, rejected, key=lambda numbered: numbered[0]):
            yield _line(document)

    def _drawn(self, jobs: list[Job]) -> Iterator[bytes]:
        """One image after the other, since ten of them are too many for memory."""
        created = max(int(job.finished_at.timestamp()) for job in jobs if job.finished_at)
        body = {"created": created, "output_format": jobs[0].request.format.value, "usage": Usage().model_dump()}
        response = {"status_code": 200, "request_id": jobs[0].id.hex, "body": body | {"data": []}}
        line = json.dumps({**_identity(jobs[0]), "error": None, "response": response})
        yield line.removesuffix("]}}}").encode()
        inline = (jobs[0].source or {}).get("response_format") == "b64_json"
        for index, job in enumerate(jobs):
            yield b", " * bool(index) + json.dumps(self.pictures.of(job, "b64_json" if inline else "url")).encode()
        yield b"]}}}\n"

    def _lines(self) -> Iterator[list[Job]]:
        """The jobs of each line, in the order of the input, where they stand together."""
        if not self._ours:
            return ([job] for job in self._jobs())
        return (list(jobs) for _, jobs in groupby(self._jobs(), key=_number))

    def _jobs(self) -> Iterator[Job]:
        after = -1
        while page := self.store.batch_jobs(self.batch.id, after=after, limit=PAGE):
            yield from page if self._ours else (job.model_copy(update={"source": None}) for job in page)
            after = page[-1].position

    def _rejections(self) -> Iterator[Rejection]:
        after = 0
        while page := self.store.rejections(self.batch.id, after=after, limit=PAGE):
            yield from page if self._ours else (replace(rejection, source={}) for rejection in page)
            after = page[-1].line

    @property
    def _ours(self) -> bool:
        """Whether the input was OpenAI's, and so what each line held."""
        return self.batch.file_id is not None


def _number(job: Job) -> int:
    return job.position + 1 if job.line is None else job.line


def _custom_id(job: Job) -> str:
    return str((job.source or {}).get("custom_id") or f"job-{job.id}")


def _identity(job: Job) -> dict[str, Any]:
    return {"id": f"batch_req_{job.id.hex}", "custom_id": _custom_id(job)}


def _good(jobs: list[Job]) -> bool:
    return all(job.state is State.SUCCEEDED for job in jobs)


def _failed(jobs: list[Job]) -> dict[str, Any]:
    """Of the line's jobs the first without an image tells why."""
    job = next(job for job in jobs if job.state is not State.SUCCEEDED)
    if job.state is State.CANCELLED:
        fault = {"code": "batch_cancelled", "message": "it was cancelled before its images were drawn"}
        return {**_identity(job), "response": None, "error": fault}
    fault = fault_of(job)
    status = 500 if fault["type"] == "server_error" else 400
    response = {"status_code": status, "request_id": job.id.hex, "body": {"error": fault}}
    return {**_identity(job), "response": response, "error": None}


def _rejected(rejection: Rejection) -> dict[str, Any]:
    request_id = f"line-{rejection.line}"
    fault = error(rejection.message, 400, param=rejection.field, code=rejection.code)
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": rejection.source.get("custom_id") or request_id,
        "response": {"status_code": 400, "request_id": request_id, "body": {"error": fault}},
        "error": None,
    }


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _in_pieces(parts: Iterator[bytes]) -> Generator[bytes, None, None]:
    """Small ones together: each piece that is sent costs a change of threads."""
    piece = bytearray()
    for part in parts:
        piece += part
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)
