"""The embedded servers, really started, used, killed and started again."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import httpx
import psutil
import psycopg
import pytest
import redis
from botocore.config import Config
from botocore.exceptions import ClientError

from producer.jobs.errors import AlreadyRunning, SettingsError
from producer.jobs.local import Processes, local_servers
from producer.jobs.local.processes import wait_gone
from producer.jobs.settings import Settings, load_settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "kept"
SUPERVISOR = """
import sys, time
from pathlib import Path
from producer.jobs.local import local_servers
from producer.jobs.settings import Settings

with local_servers(Settings(data_dir=Path(sys.argv[1]))) as farm:
    farm.processes.start("worker", ["sleep", "1000"])
    farm.processes.start("forking", ["/bin/sh", "-c", "sleep 1000 & sleep 1000"])
    print("up", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole module: every test meets what those before it left."""
    return tmp_path_factory.mktemp("local") / "a folder"


@contextlib.contextmanager
def s3_client(settings: Settings, secret: str | None = None) -> "Iterator[S3Client]":
    client = boto3.client(
        "s3",
        endpoint_url=settings.require("s3_endpoint_url"),
        aws_access_key_id=settings.require("s3_access_key_id"),
        aws_secret_access_key=secret or settings.require("s3_secret_access_key"),
        region_name=settings.s3_region,
        config=Config(proxies={}, retries={"total_max_attempts": 1}, signature_version="s3v4"),
    )
    with contextlib.closing(client):
        yield client


def write(settings: Settings, word: str) -> None:
    """Leaves a word in each of the servers."""
    with psycopg.connect(settings.require("database_url")) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS words (word text)")
        connection.execute("INSERT INTO words VALUES (%s)", [word])
    with redis.Redis.from_url(settings.require("redis_url")) as client:
        client.rpush("words", word)
    with s3_client(settings) as s3:
        s3.create_bucket(Bucket=BUCKET)
        s3.put_object(Bucket=BUCKET, Key=f"words/{word}", Body=word.encode())


def read(settings: Settings) -> list[set[str]]:
    """The words in each of the servers."""
    with psycopg.connect(settings.require("database_url")) as connection:
        rows = {str(word) for (word,) in connection.execute("SELECT word FROM words")}
    with redis.Redis.from_url(settings.require("redis_url"), decode_responses=True) as client:
        items = set(client.lrange("words", 0, -1))
    with s3_client(settings) as s3:
        keys = {item["Key"].removeprefix("words/") for item in s3.list_objects_v2(Bucket=BUCKET)["Contents"]}
        bodies = {s3.get_object(Bucket=BUCKET, Key=f"words/{key}")["Body"].read().decode() for key in keys}
    assert keys == bodies
    return [rows, items, keys]


def registered(data_dir: Path) -> dict[str, psutil.Process]:
    records = json.loads((data_dir / "processes.json").read_text())
    return {record["name"]: psutil.Process(record["pid"]) for record in records}


def kill_group(process: psutil.Process) -> None:
    os.killpg(process.pid, signal.SIGKILL)


class TestOneLifeAfterAnother:
    def test_data_ports_and_keys_survive_a_stop(self, data_dir: Path) -> None:
        with local_servers(Settings(data_dir=data_dir)) as farm:
            first = farm.settings
            assert load_settings(data_dir=data_dir) == first
            assert stat.S_IMODE(first.services_path.stat().st_mode) == 0o600
            write(first, "stopped")
        assert not first.services_path.exists()
        with local_servers(Settings(data_dir=data_dir)) as farm:
            assert farm.settings == first
            assert read(farm.settings) == [{"stopped"}] * 3

    def test_what_was_acknowledged_survives_the_death_of_every_server(self, data_dir: Path) -> None:
        with local_servers(Settings(data_dir=data_dir)) as farm:
            write(farm.settings, "killed")
            servers = registered(data_dir)
            for process in servers.values():
                kill_group(process)
            assert all(wait_gone(process, 10) for process in servers.values())
            assert {ended.name for ended in farm.processes.poll()} == {"redis", "postgres", "s3"}
            assert farm.processes.running() == []
        with local_servers(Settings(data_dir=data_dir)) as farm:
            assert read(farm.settings) == [{"stopped", "killed"}] * 3

    def test_a_port_that_was_taken_meanwhile_is_exchanged(self, data_dir: Path) -> None:
        ports = json.loads((data_dir / "ports.json").read_text())
        squatter = socket.create_server(("127.0.0.1", ports["redis"]))
        with squatter, local_servers(Settings(data_dir=data_dir)) as farm:
            assert str(ports["redis"]) not in farm.settings.require("redis_url")
            assert str(ports["s3"]) in farm.settings.require("s3_endpoint_url")
            assert read(farm.settings) == [{"stopped", "killed"}] * 3

    def test_a_stale_note_of_a_postmaster_is_no_obstacle(self, data_dir: Path) -> None:
        """After a reboot the pid in it may be anybody's: here it is this test's."""
        note = data_dir / "postgres" / "postmaster.pid"
        note.write_text(f"{os.getpid()}\n{note.parent}\n1\n5432\n\n127.0.0.1\n  1 1\n")
        with local_servers(Settings(data_dir=data_dir)) as farm:
            assert read(farm.settings) == [{"stopped", "killed"}] * 3


class TestKilledSupervisor:
    @pytest.fixture
    def supervisor(self, data_dir: Path) -> Iterator[subprocess.Popen[str]]:
        child = subprocess.Popen([sys.executable, "-c", SUPERVISOR, data_dir], stdout=subprocess.PIPE, text=True)
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
            yield child
            child.kill()

    def test_a_second_one_is_refused_while_it_lives(self, data_dir: Path, supervisor: subprocess.Popen[str]) -> None:
        with pytest.raises(AlreadyRunning, match=str(supervisor.pid)) as caught:
            local_servers(Settings(data_dir=data_dir)).__enter__()
        assert caught.value.pid == supervisor.pid
        assert len(registered(data_dir)) == 5

    def test_what_it_left_is_stopped_and_replaced(self, data_dir: Path, supervisor: subprocess.Popen[str]) -> None:
        left = registered(data_dir)
        assert list(left) == ["redis", "s3", "postgres", "worker", "forking"]
        forked = left["forking"].children()
        supervisor.kill()
        supervisor.wait()
        left["forking"].kill()
        assert all(process.is_running() for process in [left["redis"], left["postgres"], left["s3"], left["worker"]])

        stale = load_settings(data_dir=data_dir)
        assert stale.database_url is not None
        with local_servers(stale) as farm:
            assert all(wait_gone(process, 0) for process in [*left.values(), *forked])
            assert farm.processes.running() == ["redis", "s3", "postgres"]
            assert "stopped" in read(farm.settings)[0]

    def test_a_recycled_pid_is_not_touched(self, tmp_path: Path) -> None:
        with subprocess.Popen(["sleep", "1000"], start_new_session=True) as stranger:
            record = {"name": "old", "pid": stranger.pid, "created_s": 1.0, "stop_signal": 9, "grace_s": 1.0}
            (tmp_path / "processes.json").write_text(json.dumps([record]))
            assert Processes(tmp_path / "processes.json", tmp_path).stop_leftovers() == []
            assert stranger.poll() is None
            stranger.kill()


class TestProcesses:
    @pytest.fixture
    def processes(self, tmp_path: Path) -> Iterator[Processes]:
        processes = Processes(tmp_path / "processes.json", tmp_path)
        yield processes
        processes.stop_all()

    def ended(self, processes: Processes) -> tuple[str, int, str]:
        deadline = time.monotonic() + 10
        while not (found := processes.poll()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return found[0].name, found[0].returncode, found[0].log_tail

    def test_an_end_is_told_once_with_code_and_last_words(self, processes: Processes) -> None:
        processes.start("short", ["/bin/sh", "-c", "echo $WORD; exit 3"], {"WORD": "bye"})
        assert self.ended(processes) == ("short", 3, "bye")
        assert processes.poll() == []

    def test_a_command_that_does_not_exist_ends_with_the_reason(self, processes: Processes) -> None:
        processes.start("nothing", ["/no/such/command"])
        name, returncode, tail = self.ended(processes)
        assert (name, returncode) == ("nothing", 127)
        assert "/no/such/command" in tail

    def test_the_last_started_stops_first_and_by_its_own_signal(self, processes: Processes, tmp_path: Path) -> None:
        order = tmp_path / "order"
        script = "trap 'echo $0 $1 >> {}; exit' {}; echo ready; while :; do sleep 0.01; done"
        for name, sent in [("first", signal.SIGINT), ("second", signal.SIGTERM)]:
            trap = script.format(order, sent.name.removeprefix("SIG"))
            processes.start(name, ["/bin/sh", "-c", trap, name, sent.name], stop_signal=sent)
            self.wait_for_log(processes, name)
        processes.stop_all()
        assert order.read_text() == "second SIGTERM\nfirst SIGINT\n"

    def test_one_that_does_not_stop_is_killed_with_its_children(self, processes: Processes) -> None:
        script = "trap '' TERM; sleep 1000 & echo ready; while :; do sleep 0.01; done"
        pid = processes.start("stubborn", ["/bin/sh", "-c", script], grace_s=0.1)
        self.wait_for_log(processes, "stubborn")
        children = psutil.Process(pid).children()
        processes.stop("stubborn")
        assert children
        assert all(wait_gone(process, 10) for process in children)

    def wait_for_log(self, processes: Processes, name: str) -> None:
        deadline = time.monotonic() + 10
        while "ready" not in processes.log_tail(name):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="class")
def farm(data_dir: Path) -> Iterator[Settings]:
    with local_servers(Settings(data_dir=data_dir)) as running:
        yield running.settings


class TestDoors:
    """Who may come in, and by which door."""

    def test_nothing_listens_but_one_port_of_the_loopback_each(self, farm: Settings) -> None:
        for name, leader in registered(farm.data_dir).items():
            family = [leader, *leader.children(recursive=True)]
            found = {c.laddr for process in family for c in process.net_connections("all") if c.status == "LISTEN"}
            ports = json.loads((farm.data_dir / "ports.json").read_text())
            assert found == {("127.0.0.1", ports[name])}

    def test_no_secret_stands_in_the_arguments_of_a_process(self, farm: Settings) -> None:
        credentials = json.loads((farm.data_dir / "credentials.json").read_text()).values()
        arguments = " ".join(part for process in registered(farm.data_dir).values() for part in process.cmdline())
        assert not [secret for secret in credentials if secret in arguments]

    def test_a_wrong_secret_is_refused_everywhere(self, farm: Settings) -> None:
        with s3_client(farm, "wrong") as s3, pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            s3.list_buckets()
        with (
            redis.Redis(port=int(farm.require("redis_url").split(":")[-1][:-2]), password="wrong") as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(farm.require("database_url"), password="wrong")

    def test_presigned_links_open_and_unsigned_ones_do_not(self, farm: Settings) -> None:
        with s3_client(farm) as s3, httpx.Client(trust_env=False) as http:
            link = s3.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": "words/stopped"})
            assert http.get(link).text == "stopped"
            assert http.get(link.partition("?")[0]).status_code == 403
            assert http.get(link.replace("stopped", "killed")).status_code == 403
            assert http.post(f"{farm.s3_endpoint_url}/_ministack/reset").status_code == 403
            put = s3.generate_presigned_url("put_object", Params={"Bucket": BUCKET, "Key": "put"})
            assert http.put(put, content=b"x" * 2_000_000).status_code == 200
            assert s3.head_object(Bucket=BUCKET, Key="put")["ContentLength"] == 2_000_000


class TestBadDays:
    def test_a_server_of_ones_own_is_not_started(self, data_dir: Path) -> None:
        own = {"database_url": "postgresql://me@elsewhere/db", "s3_endpoint_url": "http://elsewhere"}
        with local_servers(Settings.model_validate(own | {"data_dir": data_dir})) as farm:
            assert farm.processes.running() == ["redis"]
            assert farm.settings.require("database_url") == own["database_url"]
            assert farm.settings.s3_access_key_id is None
            assert list(json.loads(farm.settings.services_path.read_text())) == ["redis_url"]

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(SettingsError, match=r"file/ovis.*OVIS_DATA_DIR"):
            local_servers(Settings(data_dir=tmp_path / "file" / "ovis")).__enter__()

    def test_another_versions_database_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "postgres").mkdir()
        (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
        with pytest.raises(SettingsError, match="made by PostgreSQL 9"):
            local_servers(Settings(data_dir=tmp_path)).__enter__()
        assert registered(tmp_path) == {}

    def test_lost_credentials_are_told_from_a_slow_start(self, data_dir: Path) -> None:
        credentials = data_dir / "credentials.json"
        kept = credentials.read_text()
        credentials.unlink()
        with pytest.raises(SettingsError, match=r"credentials\.json"):
            local_servers(Settings(data_dir=data_dir)).__enter__()
        credentials.write_text(kept)

    def test_a_server_that_does_not_come_up_shows_its_log(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("producer.jobs.local.servers.s3.environment", lambda *_: {"AWS_ACCESS_KEY_ID": "id"})
        with pytest.raises(SettingsError, match=r"s3 ended with exit code 1(.|\n)*KeyError"):
            local_servers(
                Settings.model_validate({"data_dir": tmp_path, "database_url": "postgresql://x/y"})
            ).__enter__()
