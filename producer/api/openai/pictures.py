"""A drawn image as OpenAI's answers hold it: a link that is valid for a while, or the file itself in base64."""

from base64 import b64encode
from typing import Any, Literal

from pydantic import BaseModel

from producer.jobs.contract import Job
from producer.jobs.storage import Storage

Delivery = Literal["url", "b64_json"]


class TokenDetails(BaseModel):
    """Of what is handed in."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Nothing: there are no tokens to be paid for. OpenAI's package reads it nevertheless."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class Pictures:
    """The images of jobs that have succeeded, each with the seed that it was drawn from."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def of(self, job: Job, delivery: Delivery) -> dict[str, Any]:
        """Raises: Unavailable, NotFound: the object is gone."""
        if delivery == "url":
            return {"url": self._storage.link(_key(job), job.file_name), "seed": job.request.seed}
        return {"b64_json": b64encode(self._file(job)).decode(), "seed": job.request.seed}

    def _file(self, job: Job) -> bytes:
        return self._storage.get(_key(job))


class Sizes(Pictures):
    """The same without the files, and without asking the bucket: to tell how long a file will be.

    ``left_out_bytes``: by how much all that was given is shorter than what ``Pictures`` gives.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.left_out_bytes = 0

    def of(self, job: Job, delivery: Delivery) -> dict[str, Any]:
        """Raises nothing."""
        if delivery == "b64_json":
            self.left_out_bytes += 4 * -(-(job.size_bytes or 0) // 3)
        return super().of(job, delivery)

    def _file(self, job: Job) -> bytes:
        return b""


def _key(job: Job) -> str:
    assert job.object_key is not None, "only a job that has succeeded has an image"
    return job.object_key
