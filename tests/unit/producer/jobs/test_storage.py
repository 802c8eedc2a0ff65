"""How a bucket is made sure of, whatever an S3-compatible server answers. No server is asked."""

from collections.abc import Iterator

import pytest
from botocore.stub import Stubber

from producer.jobs.errors import SettingsError, Unavailable
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage


class Stubbed:
    """A storage, and the answers that it will get."""

    def __init__(self, region: str = "us-east-1") -> None:
        keys = {"s3_access_key_id": "key", "s3_secret_access_key": "secret"}
        url = "http://127.0.0.1:1"
        self.storage = Storage(Settings.model_validate({"s3_endpoint_url": url, "s3_region": region, **keys}))
        self.answers = Stubber(self.storage._client)
        self.answers.activate()

    def head(self, status: int = 200) -> None:
        asked = {"Bucket": "ovis-images"}
        if status == 200:
            self.answers.add_response("head_bucket", {}, asked)
        else:
            self.answers.add_client_error("head_bucket", str(status), http_status_code=status, expected_params=asked)

    def close(self) -> None:
        self.storage.close()
        self.answers.assert_no_pending_responses()


@pytest.fixture
def stubbed() -> Iterator[Stubbed]:
    stubbed = Stubbed()
    yield stubbed
    stubbed.close()


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_in_trouble_is_unavailable(stubbed: Stubbed, status: int) -> None:
    stubbed.head(status)
    with pytest.raises(Unavailable, match="S3"):
        stubbed.storage.ensure_bucket()


@pytest.mark.parametrize("status", [301, 400, 401, 403])
def test_a_server_that_refuses_says_which_settings_to_check(stubbed: Stubbed, status: int) -> None:
    stubbed.head(status)
    with pytest.raises(SettingsError, match="OVIS_S3_BUCKET"):
        stubbed.storage.ensure_bucket()


@pytest.mark.parametrize("code", ["BucketAlreadyOwnedByYou", "BucketAlreadyExists"])
def test_who_loses_the_race_to_create_the_bucket_has_it_all_the_same(stubbed: Stubbed, code: str) -> None:
    stubbed.head(404)
    stubbed.answers.add_client_error("create_bucket", code, http_status_code=409)
    stubbed.head()
    stubbed.storage.ensure_bucket()


def test_a_bucket_that_is_somebody_elses_is_refused(stubbed: Stubbed) -> None:
    stubbed.head(404)
    stubbed.answers.add_client_error("create_bucket", "BucketAlreadyExists", http_status_code=409)
    stubbed.head(403)
    with pytest.raises(SettingsError, match="OVIS_S3_BUCKET"):
        stubbed.storage.ensure_bucket()


@pytest.mark.parametrize(
    ("code", "status", "raised"), [("InvalidBucketName", 400, SettingsError), ("SlowDown", 503, Unavailable)]
)
def test_a_creation_that_fails_is_classed_like_a_look(
    stubbed: Stubbed, code: str, status: int, raised: type[Exception]
) -> None:
    stubbed.head(404)
    stubbed.answers.add_client_error("create_bucket", code, http_status_code=status)
    with pytest.raises(raised, match=code):
        stubbed.storage.ensure_bucket()


@pytest.mark.parametrize(
    ("region", "place"),
    [("us-east-1", {}), ("eu-west-1", {"CreateBucketConfiguration": {"LocationConstraint": "eu-west-1"}})],
)
def test_a_bucket_is_made_in_the_region_of_the_settings(region: str, place: dict[str, object]) -> None:
    stubbed = Stubbed(region)
    stubbed.head(404)
    stubbed.answers.add_response("create_bucket", {}, {"Bucket": "ovis-images", **place})
    stubbed.storage.ensure_bucket()
    stubbed.close()
