"""The parts of the embedded servers that need no server: the data folder, and who the S3 guard lets through."""

import asyncio
import importlib
import importlib.util
import json
import os
import stat
from collections.abc import MutableMapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from producer.jobs.errors import AlreadyRunning, SettingsError
from producer.jobs.local import _without_leftovers, servers
from producer.jobs.local.folder import DataFolder, read_json, write_private
from producer.jobs.local.s3 import Guard, Refused, Request, Verifier
from producer.jobs.settings import Settings

URL = "http://127.0.0.1:9000/bucket/a%20b/%E5%9B%BE.png"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestDataFolder:
    def test_the_folder_and_its_credentials_are_private_and_kept(self, tmp_path: Path) -> None:
        folder = DataFolder(tmp_path / "deep" / "data")
        with folder.held():
            made = folder.secrets()
        assert mode(folder.path) == 0o700
        assert mode(folder.path / "credentials.json") == 0o600
        assert DataFolder(folder.path).secrets() == made
        assert made.postgres_password not in repr(made)

    def test_ports_stay_the_same_unless_somebody_takes_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = DataFolder(tmp_path)
        before = folder.ports(["redis", "s3"])
        assert folder.ports(["redis", "s3"]) == before
        monkeypatch.setattr("producer.jobs.local.folder.is_free", lambda port: port != before["redis"])
        after = folder.ports(["redis", "s3"])
        assert after["s3"] == before["s3"]
        assert after["redis"] not in before.values()

    def test_a_second_holder_is_refused_with_the_pid_of_the_first(self, tmp_path: Path) -> None:
        with DataFolder(tmp_path).held(), pytest.raises(AlreadyRunning, match="already runs") as caught:
            DataFolder(tmp_path).held().__enter__()
        assert caught.value.pid is not None
        with DataFolder(tmp_path).held():
            pass

    def test_a_folder_below_a_file_is_refused_by_name(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(SettingsError, match=r"file/data.*OVIS_DATA_DIR"), DataFolder(tmp_path / "file/data").held():
            pass

    def test_a_broken_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "ports.json").write_text("{")
        with pytest.raises(SettingsError, match=r"ports\.json"):
            DataFolder(tmp_path).ports(["redis"])

    def test_a_private_file_is_replaced_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "services.json"
        path.touch(mode=0o644)
        write_private(path, "[1]")
        assert (mode(path), read_json(path), list(tmp_path.iterdir())) == (0o600, [1], [path])


class TestWithoutLeftovers:
    def test_addresses_of_a_killed_farm_are_not_taken_for_ones_own(self, tmp_path: Path) -> None:
        left = {"database_url": "postgresql://old", "redis_url": "redis://old"}
        (tmp_path / "services.json").write_text(json.dumps(left))
        settings = Settings.model_validate(left | {"data_dir": tmp_path, "redis_url": "redis://mine"})
        cleaned = _without_leftovers(settings)
        assert cleaned.database_url is None
        assert cleaned.require("redis_url") == "redis://mine"


class TestMissingServers:
    @pytest.fixture(autouse=True)
    def _nothing_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(name: str) -> None:
            raise ModuleNotFoundError(name)

        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(importlib, "import_module", refuse)

    def test_each_missing_server_names_the_extra_and_the_variable(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"ovis-batch\[local\].*OVIS_REDIS_URL"):
            servers.redis_binary()
        with pytest.raises(SettingsError, match=r"ovis-batch\[local\].*OVIS_DATABASE_URL"):
            servers.postgres_binaries()
        with pytest.raises(SettingsError, match=r"ovis-batch\[local\].*OVIS_S3_ENDPOINT_URL"):
            servers.S3Server(tmp_path, 1, "id", "secret", "region").prepare()

    def test_root_without_user_namespaces_is_told_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        with pytest.raises(SettingsError, match="ordinary user, or set OVIS_DATABASE_URL"):
            servers.unprivileged()


class TestVerifier:
    @property
    def now(self) -> datetime:
        """The signer's clock is the machine's, so the verifier's must go with it."""
        return datetime.now(UTC).replace(microsecond=0)

    def signed(self, secret: str = "secret", *, url: str = URL, method: str = "GET") -> Request:
        request = AWSRequest(method=method, url=url, headers={"Host": "127.0.0.1:9000"}, data=b"body")
        S3SigV4Auth(Credentials("id", secret), "s3", "eu-west-1").add_auth(request)
        return Request(method, url, {name.lower(): str(value) for name, value in request.headers.items()})

    def presigned(self, secret: str = "secret", *, expires_s: int = 60) -> Request:
        request = AWSRequest(method="GET", url=URL, headers={"Host": "127.0.0.1:9000"})
        S3SigV4QueryAuth(Credentials("id", secret), "s3", "eu-west-1", expires_s).add_auth(request)
        return Request("GET", str(request.url), {"host": "127.0.0.1:9000"})

    def check(self, request: Request, now: datetime | None = None) -> None:
        Verifier("id", "secret").check(request, now or self.now)

    def refusal(self, request: Request, now: datetime | None = None) -> str:
        with pytest.raises(Refused) as caught:
            self.check(request, now)
        return caught.value.code

    def test_what_is_signed_with_the_secret_passes(self) -> None:
        self.check(self.signed())
        self.check(self.signed(url=URL + "?list-type=2&prefix=a%2Fb"))
        self.check(self.presigned())

    def test_another_secret_or_key_does_not(self) -> None:
        assert self.refusal(self.signed("wrong")) == "SignatureDoesNotMatch"
        assert self.refusal(self.presigned("wrong")) == "SignatureDoesNotMatch"
        with pytest.raises(Refused, match="access key"):
            Verifier("other", "secret").check(self.signed(), self.now)

    def test_a_signature_is_good_for_what_was_signed_alone(self) -> None:
        signed, presigned = self.signed(), self.presigned()
        assert self.refusal(Request("DELETE", signed.url, signed.headers)) == "SignatureDoesNotMatch"
        assert self.refusal(Request("GET", signed.url + "x", signed.headers)) == "SignatureDoesNotMatch"
        longer = presigned.url.replace("X-Amz-Expires=60", "X-Amz-Expires=600")
        assert self.refusal(Request("GET", longer, presigned.headers)) == "SignatureDoesNotMatch"

    def test_time_passes(self) -> None:
        later = self.now + timedelta(minutes=16)
        assert self.refusal(self.signed(), later) == "RequestTimeTooSkewed"
        assert self.refusal(self.presigned(), later) == "AccessDenied"

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": "Basic aWQ6c2VjcmV0"},
            {"authorization": "AWS4-HMAC-SHA256 nonsense"},
            {"authorization": "AWS4-HMAC-SHA256 Credential=id/x/y/s3/aws4_request, SignedHeaders=host, Signature=é"},
        ],
    )
    def test_what_is_not_signed_is_refused(self, headers: dict[str, str]) -> None:
        assert self.refusal(Request("GET", URL, {"host": "127.0.0.1:9000"} | headers)) == "AccessDenied"

    @pytest.mark.parametrize("query", ["X-Amz-Signature=x", "X-Amz-Signature=x&X-Amz-Algorithm=none&X-Amz-Expires=é"])
    def test_half_a_presigned_link_is_refused(self, query: str) -> None:
        assert self.refusal(Request("GET", f"{URL}?{query}", {"host": "127.0.0.1:9000"})) == "AccessDenied"


class TestGuard:
    def status(self, path: str) -> int:
        sent: list[MutableMapping[str, Any]] = []

        async def reached(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("reached what is behind the guard")

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1:9000")],
        }
        asyncio.run(Guard(reached, Verifier("id", "secret"))(scope, receive, send))
        return int(sent[0]["status"])

    def test_nothing_unsigned_reaches_ministack(self) -> None:
        assert self.status("/bucket/key") == 403

    def test_its_administration_is_out_of_reach(self) -> None:
        assert self.status("/_ministack/reset") == 403
