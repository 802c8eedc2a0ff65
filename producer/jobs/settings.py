"""The one frozen settings object of a process, and the only place that reads the environment.

Built at the door by ``load_settings`` and passed down. What is not set explicitly and has an embedded default
(Postgres, Redis, S3) is taken from ``services.json`` in the data folder, which ``producer.jobs.local`` writes when
it starts those servers; so a second terminal finds the farm that ``ovis-batch up`` runs.
"""

import difflib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from producer.jobs.errors import SettingsError, Unavailable

log = logging.getLogger(__name__)

PREFIX = "OVIS_"
OWNER_VARIABLE = "OVIS_SUPERVISED_BY"
"""No setting: by it a supervisor knows its processes again."""
SERVICES_FILE = "services.json"
SMALL_INTEGER_MAX = 32_767
"""What the column of a job's failures holds."""
PORT_MAX = 65_535

HOST = r"(?:\[[^\]@/]+\]|[^\s:/?#@\[\]]+)"
PORT = r"(?::(?P<port>\d{1,5}))?"
HTTP = re.compile(rf"https?://{HOST}{PORT}(?:/[^\s?#@]*)?")
HTTP_FORM = "http://host:port"
ENCODED = "with @ / ? # : of a password percent-encoded"
# As the libraries read them: SQLAlchemy takes a password up to the first @ and allows no host (a Unix socket), redis
# ends it at / ? # as well.
ADDRESSES = {
    "database_url": (
        re.compile(rf"postgres(?:ql)?(?:\+\w+)?://(?:[^@]*@)?{HOST}?{PORT}(?:/[^\s@]*)?(?:\?[^\s@]*)?"),
        f"postgresql://user:password@host:port/name, {ENCODED}",
    ),
    "redis_url": (
        re.compile(rf"rediss?://(?:[^@/?#]*@)?{HOST}{PORT}(?:/\d*)?(?:\?\S*)?"),
        f"redis://:password@host:port/0, {ENCODED}",
    ),
    "s3_endpoint_url": (HTTP, HTTP_FORM),
    "s3_public_endpoint_url": (HTTP, HTTP_FORM),
    "api_url": (HTTP, HTTP_FORM),
}
"""The pattern of each address, and the form that a person is told."""
VARIABLES = {"Postgres": "OVIS_DATABASE_URL", "Redis": "OVIS_REDIS_URL", "S3": "OVIS_S3_ENDPOINT_URL"}
"""The variable that leads to each dependency, by the name that ``Unavailable`` gives it."""
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a server that listens everywhere is reached from its own machine."""

Address = TypeVar("Address", str, SecretStr, None)


class Durations(BaseModel):
    """Every duration of the farm's own clockwork, in seconds, all scaled by one factor.

    Tests run the same code with a small factor; a farm on a slow network may use one above 1.
    """

    model_config = ConfigDict(frozen=True)

    scale: PositiveFloat = 1.0

    def _scaled(self, seconds: float) -> float:
        return seconds * self.scale

    @property
    def heartbeat_s(self) -> float:
        """Between two heartbeats of a worker."""
        return self._scaled(5)

    @property
    def lease_s(self) -> float:
        """A worker silent for this long has lost its claims."""
        return self._scaled(20)

    @property
    def claim_check_s(self) -> float:
        """Between two questions of a worker which of its claims no longer hold."""
        return self._scaled(1)

    @property
    def leader_s(self) -> float:
        """A leader that did not renew for this long has lost its post."""
        return self._scaled(4)

    @property
    def renew_s(self) -> float:
        """Between two renewals of the leader's post, and two sweeps for lapsed leases."""
        return self._scaled(1)

    @property
    def top_up_s(self) -> float:
        """Between two looks at the window when nothing notifies the dispatcher."""
        return self._scaled(0.2)

    @property
    def audit_s(self) -> float:
        """A message older than this that is not in its queue is published again."""
        return self._scaled(3)

    @property
    def retry_s(self) -> float:
        """The first wait after a transient failure; it doubles with each, up to 64 times this."""
        return self._scaled(2)

    @property
    def sweep_s(self) -> float:
        """Between two walks through the bucket for objects that nothing points to."""
        return self._scaled(600)

    @property
    def stream_s(self) -> float:
        """Between two looks for events that somebody follows."""
        return self._scaled(0.5)

    @property
    def stream_beat_s(self) -> float:
        """A stream of events is not silent for longer, and its key is looked at again as often."""
        return self._scaled(15)

    @property
    def delivery_s(self) -> float:
        """Between two looks for deliveries that are due."""
        return self._scaled(1)

    @property
    def delivery_waits_s(self) -> tuple[float, ...]:
        """Before each further attempt of a delivery, and up to a fifth more: ten attempts in three to four days."""
        return tuple(map(self._scaled, (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)))

    @property
    def grace_s(self) -> float:
        """What a worker that is told to stop may still take to finish what it draws."""
        return self._scaled(20)


class Settings(BaseSettings):
    """All settings, each from the environment variable ``OVIS_`` + its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    data_dir: Path = Field(default=Path(".ovis"), description="Where the embedded servers keep their data.")

    database_url: SecretStr | None = Field(default=None, description=ADDRESSES["database_url"][1])
    redis_url: SecretStr | None = Field(default=None, description=ADDRESSES["redis_url"][1])
    s3_endpoint_url: str | None = Field(default=None, description="The S3-compatible server that workers write to.")
    s3_public_endpoint_url: str | None = Field(
        default=None, description="The same server as browsers and clients reach it; default: s3_endpoint_url."
    )
    s3_bucket: str = "ovis-images"
    s3_region: str = "us-east-1"
    s3_access_key_id: SecretStr | None = None
    s3_secret_access_key: SecretStr | None = None
    presign_s: int = Field(default=3600, ge=1, le=604_800, description="How long a link to an image stays valid.")

    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8000, ge=0, le=PORT_MAX)
    require_keys: bool = Field(
        default=False, description="Nobody uses the API without a key; always so when it listens beyond the loopback."
    )
    api_url: str | None = Field(default=None, description="Where the command line finds the API.")
    api_key: SecretStr | None = Field(default=None, description="By which the command line asks the API.")
    webhook_private: bool = Field(
        default=False, description="Webhooks may lead into private networks, and be plain http."
    )

    image_wait_s: PositiveFloat = Field(
        default=570, description="How long POST /v1/images/generations waits; OpenAI's package waits 600 s."
    )

    model: str | None = Field(default=None, description="'tiny', a checkpoint folder, or a hub name.")
    model_revision: str | None = Field(default=None, description="A commit of the hub repository.")
    offline: bool = Field(default=False, description="Load the model from the local cache only.")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, …; default: cuda if there is one.")
    step_tokens: int | None = Field(
        default=None, ge=1024, description="Tokens that images may bring to one step; default: what the memory allows."
    )
    compile: bool = Field(default=True, description="Compile the model on CUDA when a worker starts: minutes, once.")
    fp8: bool = Field(default=False, description="Linear layers in 8 bits: faster on CUDA, and other pictures.")
    low_memory: bool = Field(default=False, description="For cards of 24 GB and less: slower to read prompts.")
    upload_slots: int = Field(
        default=4, ge=1, le=64, description="Images a worker may encode and upload beside drawing."
    )
    checkpoint_steps: int = Field(
        default=20,
        ge=0,
        description="A kill costs an image at most so many steps; 0: drawn images are kept only at a stop.",
    )
    held_mb: int = Field(
        default=1024, ge=0, description="Disk for what is drawn while the bucket is away, in millions of bytes."
    )
    grace_s: PositiveFloat | None = Field(
        default=None, description="What a worker that is told to stop may take to finish images; default: 20 s, scaled."
    )
    step_limit_s: PositiveFloat = Field(default=600, description="A step that takes longer ends the worker process.")
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(default=None, ge=0, le=PORT_MAX, description="/metrics of dispatcher and worker.")

    max_failures: int = Field(
        default=3, ge=1, le=SMALL_INTEGER_MAX, description="A job with this many failures is failed."
    )
    time_scale: PositiveFloat = Field(default=1.0, description="Multiplies every duration of the farm's clockwork.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @field_validator(*ADDRESSES)
    @classmethod
    def _well_formed(cls, address: Address, info: ValidationInfo) -> Address:
        """Says the form and not the address, which may hold a password."""
        if address is None:
            return address
        pattern, form = ADDRESSES[str(info.field_name)]
        found = pattern.fullmatch(address if isinstance(address, str) else address.get_secret_value())
        if found is None or int(found["port"] or 0) > PORT_MAX:
            raise ValueError(f"must be of the form {form}")
        return address

    @property
    def durations(self) -> Durations:
        return Durations(scale=self.time_scale)

    @property
    def stop_grace_s(self) -> float:
        """What a worker that is told to stop may still take to finish what it draws.

        The first line of a stop's timetable, in seconds. The worker then gives back what is unfinished, abandons a
        step that takes longer than ``give_back_s``, and ends itself at ``deadline_s``; its supervisor kills it after
        ``kill_after_s``, and whoever keeps the supervisor waits still longer.
        """
        return self.grace_s if self.grace_s is not None else self.durations.grace_s

    @property
    def give_back_s(self) -> float:
        """After the grace time: for a step to end, and its last checkpoint to be stored."""
        return self.stop_grace_s / 4 + 0.5

    @property
    def deadline_s(self) -> float:
        """After a worker was told to stop it ends itself, though something hangs."""
        return 1.5 * self.stop_grace_s + 2

    @property
    def kill_after_s(self) -> float:
        """After a worker was told to stop its supervisor kills it: the deadline's last acts take 2 s."""
        return 2 * self.stop_grace_s + 5

    @property
    def services_path(self) -> Path:
        return self.data_dir / SERVICES_FILE

    @property
    def models_dir(self) -> Path:
        return self.data_dir / "models"

    @property
    def base_url(self) -> str:
        """Where this farm's API answers to a program on this machine.

        Raises:
            SettingsError: the API takes a free port, so that these settings alone cannot tell.
        """
        if self.api_url:
            return self.api_url
        if not self.api_port:
            raise SettingsError("OVIS_API_PORT is 0, a free port: set OVIS_API_URL to what the API says when it starts")
        host = LOOPBACK.get(self.api_host, self.api_host)
        return f"http://[{host}]:{self.api_port}" if ":" in host else f"http://{host}:{self.api_port}"

    def require(self, name: str) -> str:
        """The value of a service's setting.

        Raises:
            SettingsError: neither the environment nor an embedded server gives it.
        """
        value = getattr(self, name)
        if value is None:
            raise SettingsError(
                f"OVIS_{name.upper()} is not set and no embedded server runs under {self.data_dir}: "
                "start `ovis-batch up` in another terminal, or set it to a server of your own"
            )
        return value.get_secret_value() if isinstance(value, SecretStr) else str(value)

    def with_services(self, services: dict[str, Any]) -> "Settings":
        """These settings, completed by the embedded servers' addresses where none of one's own is set.

        The S3 keys belong to their endpoint: an endpoint of one's own never gets the embedded server's keys.
        """
        if self.s3_endpoint_url is not None:
            services = {name: value for name, value in services.items() if not name.startswith("s3_")}
        missing = {name: value for name, value in services.items() if getattr(self, name) is None}
        return Settings.model_validate(self.model_dump(exclude_none=True) | missing)


def load_settings(**overrides: Any) -> Settings:
    """The settings of this process: overrides, then environment, then the embedded servers that run.

    Raises:
        SettingsError: a variable has a value that cannot be used; the message names it.
    """
    if OWNER_VARIABLE not in os.environ:  # else the supervisor has said it
        _warn_of_unknown_variables()
    try:
        settings = Settings(**overrides)
        return settings.with_services(_running_services(settings.services_path))
    except ValidationError as error:
        problems = "; ".join(
            f"OVIS_{str(e['loc'][0]).upper()}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )
        raise SettingsError(f"{problems}: change the environment variable") from None


def _warn_of_unknown_variables() -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for variable in sorted(name for name in os.environ if name.upper().startswith(PREFIX)):
        if variable.upper() not in known:
            nearest = next(iter(difflib.get_close_matches(variable.upper(), known, n=1)), None)
            log.warning("%s is no setting, and nothing reads it%s", variable, f": is it {nearest}?" if nearest else "")


def told(error: Exception) -> str:
    """The words with which a process ends: those of its error and, where a server is away, what to do about it."""
    variable = VARIABLES.get(error.dependency) if isinstance(error, Unavailable) else None
    if variable is None:
        return str(error)
    return f"{error}: start it, or check {variable} (the embedded one runs as long as `ovis-batch up`)"


def _running_services(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read ({error}): remove it and start `ovis-batch up` again") from error
