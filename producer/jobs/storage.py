"""The bucket: object keys, put, get, list, delete and presigned links.

A key holds batch, job and claim, so no two claims ever write the same object, and a claim that lost its lease can
leave at most an object that no row points to. No correctness is built on conditional PUT: S3-compatible servers
differ there.
"""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import md5
from typing import IO, TYPE_CHECKING, Any, cast
from uuid import UUID

import boto3
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.handlers import add_expect_header
from urllib3.exceptions import HTTPError

from pipeline.request import ImageFormat
from producer.jobs.errors import NotFound, SettingsError, Unavailable
from producer.jobs.s3_clock import ServerClock
from producer.jobs.settings import Settings

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.literals import BucketLocationConstraintType
    from mypy_boto3_s3.type_defs import CreateBucketConfigurationTypeDef

DEFAULT_REGION = "us-east-1"
IMAGES = "images/"
CHECKPOINTS = "checkpoints/"
PREVIEWS = "previews/"
FILES = "files/"
PIECE_BYTES = 262_144
PAGE = 1000
"""Keys that S3 lists or deletes at once, at most."""
MOST_CONNECTIONS = 80
"""As many as a worker may have threads: images that share steps end, and are uploaded, together."""
NO_SUCH_BUCKET = 404
PASSING = frozenset({408, 429})
"""Statuses below 500 that say: not now."""
TELLS_THE_END = frozenset({"content-length", "transfer-encoding"})
"""Without one of these headers, a connection that breaks looks like the end of the object."""
CREATED_MEANWHILE = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})


def object_key(batch_id: UUID | None, job_id: UUID, claim: int, image_format: ImageFormat) -> str:
    """``images/<batch or 'single'>/<job>/<claim>.<suffix>``."""
    return f"{IMAGES}{batch_id or 'single'}/{job_id}/{claim}.{image_format.suffix}"


def checkpoint_key(job_id: UUID, claim: int, step: int) -> str:
    """``checkpoints/<job>/<claim>-<step>.safetensors``: an image that was drawn as far as this step."""
    return f"{CHECKPOINTS}{job_id}/{claim}-{step}.safetensors"


def preview_key(job_id: UUID, claim: int, step: int) -> str:
    """``previews/<job>/<claim>-<step>.jpg``: how the image looked after this step."""
    return f"{PREVIEWS}{job_id}/{claim}-{step}.jpg"


class Storage:
    """The farm's bucket. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        self.bucket = settings.s3_bucket
        self._presign_s = settings.presign_s
        self._endpoint_url = settings.require("s3_endpoint_url")
        clock = ServerClock()
        self._client = _client(settings, self._endpoint_url, clock)
        public = settings.s3_public_endpoint_url
        self._public = _client(settings, public, clock) if public else self._client

    def close(self) -> None:
        self._client.close()
        self._public.close()

    def ping(self) -> None:
        """Return if the bucket can be reached with these keys. Raises: Unavailable."""
        with self._reaching():
            self._client.head_bucket(Bucket=self.bucket)

    def ensure_bucket(self) -> None:
        """Create the bucket where it is missing.

        Raises:
            SettingsError: the server refuses the keys or the bucket's name.
            Unavailable: the server does not answer.
        """
        with self._reaching():
            if self._has_bucket():
                return
            try:
                self._create_bucket()
            except ClientError as error:
                # Another process was quicker: it is this farm's if these keys may look at it.
                if _code(error) not in CREATED_MEANWHILE or not self._has_bucket():
                    raise self._refused(error) from error

    def _has_bucket(self) -> bool:
        try:
            self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            if _status(error) == NO_SUCH_BUCKET:
                return False
            raise self._refused(error) from error
        return True

    def _create_bucket(self) -> None:
        region = self._client.meta.region_name
        if region == DEFAULT_REGION:  # which S3 does not take as a constraint
            self._client.create_bucket(Bucket=self.bucket)
        else:
            place: CreateBucketConfigurationTypeDef = {
                "LocationConstraint": cast("BucketLocationConstraintType", region)
            }
            self._client.create_bucket(Bucket=self.bucket, CreateBucketConfiguration=place)

    def _refused(self, error: ClientError) -> Exception:
        """The error that this refusal means: of a server in trouble, or of settings that it will never take."""
        if _status(error) in PASSING or _status(error) >= 500:
            return Unavailable("S3", _reason(error))
        return SettingsError(
            f"{self._endpoint_url} refuses the bucket {self.bucket!r} ({_reason(error)}): check "
            "OVIS_S3_ACCESS_KEY_ID, OVIS_S3_SECRET_ACCESS_KEY, OVIS_S3_BUCKET and OVIS_S3_REGION"
        )

    def put(self, key: str, body: bytes, media_type: str) -> None:
        """Write one object, all or nothing: the server compares ``body`` with its checksum.

        Raises:
            Unavailable: whatever the cause; the caller keeps ``body`` and tries again.
        """
        with self._reaching():
            answer = self._client.put_object(
                Bucket=self.bucket, Key=key, Body=body, ContentType=media_type, ContentMD5=_content_md5(body)
            )
        if "ETag" not in answer:
            raise Unavailable("S3", "half an answer on PutObject")

    def put_file(self, key: str, file: IO[bytes], media_type: str) -> None:
        """The same of a file that can be rewound, from its beginning, in constant memory. Raises: Unavailable."""
        digest = md5(usedforsecurity=False)
        file.seek(0)
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
        file.seek(0)
        checksum = b64encode(digest.digest()).decode()
        with self._reaching():
            self._client.put_object(Bucket=self.bucket, Key=key, Body=file, ContentType=media_type, ContentMD5=checksum)

    def get(self, key: str) -> bytes:
        """Read one object, all or nothing. Raises: NotFound, Unavailable."""
        body = self._body(key)
        with self._reaching():
            return body.read()

    def pieces(self, key: str) -> Iterator[bytes]:
        """Read one object piece by piece. Raises: NotFound, at once; Unavailable, in its midst too."""
        return self._pieces(self._body(key))

    def _pieces(self, body: "StreamingBody") -> Iterator[bytes]:
        with closing(body), self._reaching():
            yield from body.iter_chunks(PIECE_BYTES)

    def _body(self, key: str) -> "StreamingBody":
        with self._reaching():
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=key)
            except self._client.exceptions.NoSuchKey:
                raise NotFound("object", key) from None
        if not answer["ResponseMetadata"]["HTTPHeaders"].keys() & TELLS_THE_END:
            raise Unavailable("S3", "half an answer on GetObject")
        return answer["Body"]

    def pages(self, prefix: str) -> Iterator[list[str]]:
        """The keys that begin so, in order, up to 1,000 a page (and none empty), each asked for when it is wanted.

        Raises:
            Unavailable: while a page is fetched.
        """
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=prefix, PaginationConfig={"PageSize": PAGE}
        )
        with self._reaching():
            for page in pages:
                if "Contents" in page:
                    yield [found["Key"] for found in page["Contents"]]

    def delete(self, keys: Sequence[str]) -> None:
        """Remove up to 1,000 objects; one that is not there is no error.

        Raises:
            Unavailable: not all of them could be removed, whatever the cause; asking again does no harm.
        """
        if not keys:  # which S3 does not take
            return
        with self._reaching():
            answer = self._client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
        for left in answer.get("Errors", []):
            raise Unavailable("S3", f"{left.get('Code', '?')} on DeleteObjects of {left.get('Key', '?')}")

    def link(self, key: str, file_name: str) -> str:
        """A presigned URL to the object, valid for ``presign_s`` seconds; a browser saves it as ``file_name``.

        Signed here, without asking the server.
        """
        ascii_name = file_name.encode("ascii", "replace").decode().replace('"', "'")
        return self._public.generate_presigned_url(
            "get_object",
            Params={
                "Bucket": self.bucket,
                "Key": key,
                "ResponseContentDisposition": f'inline; filename="{ascii_name}"',
            },
            ExpiresIn=self._presign_s,
        )

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise Unavailable("S3", _reason(error)) from error
        except (BotoCoreError, HTTPError) as error:  # not all of urllib3's are translated while a body is read
            raise Unavailable("S3", str(error)) from error


def _reason(error: ClientError) -> str:
    return f"{_code(error)} on {error.operation_name}"


def _code(error: ClientError) -> str:
    return error.response["Error"].get("Code", "?")


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _content_md5(body: bytes) -> str:
    return b64encode(md5(body, usedforsecurity=False).digest()).decode()


def _add_content_md5(params: dict[str, Any], **_event: Any) -> None:
    """botocore sends a CRC32 with a deletion; some S3-compatible servers still ask for what came before it."""
    params["headers"]["Content-MD5"] = _content_md5(params["body"])


def _client(settings: Settings, endpoint_url: str, clock: ServerClock) -> "S3Client":
    access, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    client: S3Client = boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=access.get_secret_value() if access else None,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=20,
            retries={"mode": "standard", "total_max_attempts": 2},
            max_pool_connections=MOST_CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
        ),
    )
    # An image is small: asking the server's leave first (Expect: 100-continue) costs a round trip and up to a second.
    client.meta.events.unregister("before-call.s3", add_expect_header)
    client.meta.events.register("before-call.s3.DeleteObjects", _add_content_md5)
    clock.attach(client)
    return client
