"""The data folder: who may write it, who holds it, and the small private files in it.

Invariants: one supervisor at a time holds the folder, by a lock that the kernel drops with the process; a file
that holds a secret has mode 600 from its first byte, and is replaced whole or not at all.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from producer.jobs.errors import AlreadyRunning, SettingsError

HOST = "127.0.0.1"
# Below every system's range for outgoing connections, so that none of those takes a port between two starts.
PORTS = range(20_000, 32_000)
PORT_ATTEMPTS = 200


@dataclass(frozen=True)
class Secrets:
    """The embedded servers' credentials, made at the first start and kept."""

    postgres_password: str
    redis_password: str
    s3_access_key_id: str
    s3_secret_access_key: str

    def __repr__(self) -> str:
        return "Secrets(…)"

    @classmethod
    def new(cls) -> "Secrets":
        return cls(
            postgres_password=secrets.token_urlsafe(24),
            redis_password=secrets.token_urlsafe(24),
            s3_access_key_id=secrets.token_hex(10),
            s3_secret_access_key=secrets.token_urlsafe(30),
        )


class DataFolder:
    """One machine's folder of embedded servers.

    Raises:
        SettingsError: (from every method) the folder cannot be written, or one of its files cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def subfolder(self, name: str) -> Path:
        """A folder of mode 700 in the data folder, made if missing."""
        folder = self.path / name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise self._unwritable(error) from error
        return folder

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder if missing (mode 700), and holds it for this process.

        Raises:
            AlreadyRunning: another process holds it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).strip()
            raise AlreadyRunning(self.path, int(holder) if holder.isdigit() else None) from None
        except OSError as error:
            raise self._unwritable(error) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)

    def secrets(self) -> Secrets:
        """The folder's credentials, made now if there are none."""
        path = self.path / "credentials.json"
        kept = read_json(path)
        if kept is not None:
            try:
                return Secrets(**kept)
            except TypeError as error:
                raise SettingsError(f"{path} cannot be used ({error}): restore it, or remove {self.path}") from error
        made = Secrets.new()
        self._write(path, asdict(made))
        return made

    def ports(self, names: list[str]) -> dict[str, int]:
        """A free port of the loopback for each name: the one it had before, unless somebody took it meanwhile."""
        path = self.path / "ports.json"
        before: dict[str, int] = read_json(path) or {}
        now = dict(before)
        for name in names:
            if name not in before or not is_free(before[name]):
                now[name] = _free_port(taken=set(now.values()))
        if now != before:
            self._write(path, now)
        return {name: now[name] for name in names}

    def _write(self, path: Path, content: Any) -> None:
        try:
            write_private(path, json.dumps(content, indent=1))
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> SettingsError:
        return SettingsError(
            f"the data folder {self.path} cannot be written ({error.strerror}): "
            "set OVIS_DATA_DIR to a folder that you may write"
        )


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port(taken: set[int]) -> int:
    for _ in range(PORT_ATTEMPTS):
        port = secrets.choice(PORTS)
        if port not in taken and is_free(port):
            return port
    raise SettingsError(f"no free port of {HOST} found between {PORTS.start} and {PORTS.stop}")


def read_json(path: Path) -> Any:
    """The content of a file, None if there is none.

    Raises:
        SettingsError: it is there and cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read ({error}): remove it and start again") from error


def write_private(path: Path, content: str) -> None:
    """Replaces a file as a whole; it has mode 600 from its first byte."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
