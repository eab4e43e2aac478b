"""Every setting of the service, read from `NIBBLE_…` variables (and a `.env` file in the working directory).

The one trap: `database_url` and `redis_url` are None until the launcher has started its own servers; the
processes it starts get both through their environment.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_BROKERS = ("redis://", "rediss://", "redis+socket://")


def _data_home() -> Path:
    return Path.home() / ".local" / "share"


class Settings(BaseSettings):
    """Where things are and how much of them; each field is also a variable, `NIBBLE_` + its name."""

    model_config = SettingsConfigDict(
        env_prefix="NIBBLE_", env_file=".env", extra="ignore", frozen=True
    )

    data_dir: Path = Field(default_factory=lambda: _data_home() / "nibble")
    """Blobs, attempts' folders, embedded servers' data, the first API key."""
    database_url: SecretStr | None = None
    """postgresql+psycopg://…; `postgresql://` and `postgres://` are understood too."""
    database_patience_s: float = Field(default=10.0, gt=0)
    """How long PostgreSQL may be silent over a statement before it counts as away."""
    redis_url: SecretStr | None = None
    """redis://…, or redis+socket:///path for a Unix socket."""
    storage_url: str | None = None
    """Where blobs live: file:///folder (the default is data_dir/blobs), s3://…, gs://…, az://…."""
    models_file: Path = Path("models.toml")
    """The catalog of base models; relative folders in it are relative to the file."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    organization_id: str = "org-nibble"
    log_level: str = "INFO"
    metrics_token: SecretStr | None = None
    """Who sends it as a bearer token may read `/metrics`, from anywhere; None: whoever asks on this machine."""
    worker_metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Where a worker answers `/metrics`; 0 takes a free port and logs it; None: nowhere."""
    worker_metrics_host: str = "127.0.0.1"

    max_upload_bytes: int = Field(default=512_000_000, ge=1)
    min_free_bytes: int = Field(default=200_000_000, ge=0)
    """An upload that would leave less free disk than this is refused (507), and no attempt begins that would."""
    max_stored_bytes: int = Field(default=100_000_000_000, ge=1)
    """Per project: what its files, uploaded or produced, may have together; an upload beyond it is refused (413).
    What jobs produce counts and is never refused."""
    keep_checkpoints: int | None = Field(default=None, ge=0)
    """Of an ended job the last so many checkpoints stay, and that of the adapter which it offers; None: all of them."""
    keep_attempts_days: float = Field(default=30.0, ge=0)
    """How long a worker keeps the logs of an ended job's attempts in its data folder."""
    max_waiting_jobs: int = Field(default=1_000, ge=1)
    """Per project: jobs that are validated or wait; one more is refused (429)."""

    lease_s: float = Field(default=120.0, gt=0)
    renew_s: float = Field(default=15.0, gt=0)
    """At most a third of the lease: it must outlive two renewals that fail."""
    poll_s: float = Field(default=30.0, gt=0)
    """How often a worker looks for work without being kicked."""
    reap_s: float = Field(default=10.0, gt=0)
    """How often the API process looks for ended leases and for work that nobody took."""
    stop_grace_s: float = Field(default=30.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    """A job whose worker was lost this often in a row fails with worker_lost."""
    train_slots: int | None = Field(default=None, ge=0)
    """Training slots of a worker: None is one per GPU, or one on the CPU where there is no GPU."""
    resume_point_every_s: float = Field(default=600.0, ge=0, le=1e9)
    """How much of a training may have to be done again after a loss; it also saves after each epoch and at every stop."""
    train_time_s: int | None = Field(default=None, ge=1)
    """How long a job may train, all its attempts together; a job's own max_time_s may be shorter."""
    train_memory_bytes: int | None = Field(default=None, ge=1 << 30)
    """What a training process may allocate where it trains on the CPU; None is as much as there is."""
    validate_slots: int = Field(default=1, ge=0)
    validate_memory_bytes: int = Field(default=4 << 30, ge=1 << 28)
    """What the process that checks a file may allocate."""
    validate_time_s: int = Field(default=900, ge=1)
    """How long it may take once the model's files are there."""

    @field_validator("database_url")
    @classmethod
    def _psycopg_3(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        url = value.get_secret_value()
        for scheme in ("postgresql://", "postgres://"):
            if url.startswith(scheme):
                url = "postgresql+psycopg://" + url.removeprefix(scheme)
        try:
            driver = make_url(url).drivername
        except (ArgumentError, ValueError):
            raise ValueError("is no database's URL; write postgresql://…") from None
        if driver != "postgresql+psycopg":
            raise ValueError("must name a PostgreSQL: postgresql://…")
        return SecretStr(url)

    @field_validator("redis_url")
    @classmethod
    def _broker(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(_BROKERS):
            raise ValueError(
                "must name a Redis or Valkey: redis://…, rediss://…, redis+socket:///path"
            )
        return value

    @field_validator("renew_s")
    @classmethod
    def _in_time(cls, value: float, info: ValidationInfo) -> float:
        lease_s = info.data.get("lease_s", value * 3)  # absent: itself refused
        if value * 3 > lease_s:
            raise ValueError(f"must be at most a third of lease_s, which is {lease_s:g}")
        return value

    @field_validator("data_dir", "models_file")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def blobs_url(self) -> str:
        """The storage URL in force."""
        return self.storage_url or f"file://{self.data_dir / 'blobs'}"

    @property
    def attempts_dir(self) -> Path:
        """The folder of attempts' folders: `attempts_dir / job_id / str(attempt_no)`."""
        return self.data_dir / "attempts"

    @property
    def first_key_file(self) -> Path:
        """Where the first API key is kept, mode 0600."""
        return self.data_dir / "first-api-key"


class SettingsInvalid(ValueError):
    """A setting has a value that cannot be; the message names the variable, and never the value."""


def read_settings(**given: object) -> Settings:
    """Return the settings, with `given` ones (None: not given) before the variables.

    Raises:
        SettingsInvalid: a value cannot be.
    """
    try:
        values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return Settings(**values)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)
    # Without the error itself: it quotes values, and one of them is a password.
    raise SettingsInvalid("; ".join(map(_sentence, problems)))


def _sentence(problem: "ErrorDetails") -> str:
    variable = "_".join(str(part) for part in problem["loc"]).upper()
    return f"NIBBLE_{variable}: {problem['msg'].removeprefix('Value error, ')}"
