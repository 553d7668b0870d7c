"""Every setting of the server: one frozen model, read from `GRADPOST_*` and passed down."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kernels.registry import RULES

MIB = 1 << 20
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_ORIGIN = re.compile(r"https?://[^/\s,]+")


def usable_memory() -> int:
    """80 % of what this process may use, in bytes: the smaller of RAM and its control group."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits) * 8 // 10


def usable_cores() -> int:
    """Cores this process may run on, by its affinity."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)


Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """The server's settings. Environment names are `GRADPOST_` and the field in capitals.

    Raises:
        pydantic.ValidationError: A value is out of its bounds or of another type.
    """

    model_config = SettingsConfigDict(env_prefix="GRADPOST_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    uds: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="Unix socket path, instead of host and port.",
    )
    uds_mode: str = Field(
        "600", pattern="^[0-7]{3}$", description="Permissions of the socket's file, octal."
    )
    api_key: SecretStr | None = Field(
        None, description="Bearer key that every call but /health/* must carry."
    )
    insecure: bool = Field(
        False,
        description="Without a key, answer peers of other machines too. Anyone may then write.",
    )
    cors_origins: Names = Field(
        (), description="Origins of web pages that may call, separated by commas; * is every one."
    )
    threads: int = Field(
        default_factory=usable_cores, ge=1, le=1024, description="Threads that run kernels."
    )
    warm_rules: Names = Field(
        ("adam",),
        description="Rules whose kernels are loaded before /health/ready says so, by commas.",
    )
    max_sessions: int = Field(256, ge=1, le=1_000_000, description="Sessions alive at once.")
    memory_bytes: int = Field(
        default_factory=usable_memory,
        ge=MIB,
        description="Bytes that arrays of all sessions, versions and uploads may take.",
    )
    max_versions: int = Field(
        4, ge=2, le=64, description="Parameter versions of one session alive at once."
    )
    max_uploads: int = Field(64, ge=1, le=100_000, description="Uploads in flight, whole server.")
    max_connections: int = Field(
        1000, ge=1, le=1_000_000, description="Connections open at once, whole server."
    )
    max_workers: int = Field(1024, ge=1, le=1_000_000, description="Workers known per session.")
    worker_retention_s: float = Field(
        604_800.0, gt=0, le=1e9, description="Seconds of silence after which a worker is retired."
    )
    # From 1: a pull that asks for nothing waits as long for a buffer, and 0 would refuse it with
    # 409 whenever readers hold all versions.
    wait_cap_s: float = Field(
        60.0, ge=1, le=3600, description="Longest long poll, in seconds; a longer wish is cut."
    )
    data_dir: Path | None = Field(
        None, description="Folder for sessions that outlive the server; its parent must exist."
    )
    durability: Literal["none", "snapshot", "log"] = Field(
        "none", description="Of sessions that are created without stating theirs."
    )
    snapshot_interval_s: float = Field(
        60.0, gt=0, le=86_400, description="Seconds between snapshots of a session that changes."
    )
    history_steps: int = Field(
        10_000, ge=1, le=10_000_000, description="Steps kept in the history of a session."
    )
    json_elements: int = Field(
        100_000, ge=1, le=10_000_000, description="Tensor elements in one JSON body, either way."
    )
    json_bytes: int = Field(
        4 * MIB, ge=1024, le=1 << 30, description="Bytes of one JSON body, either way."
    )
    header_timeout_s: float = Field(
        10.0, gt=0, le=3600, description="Seconds a connection may take over a request's headers."
    )
    head_bytes: int = Field(
        65_536, ge=1024, le=16 * MIB, description="Bytes of a request's line and headers."
    )
    body_idle_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="Seconds an upload may pause."
    )
    body_min_bytes_per_s: float = Field(
        4096.0, ge=0, le=1e9, description="Least average rate of an upload, in bytes per second."
    )
    reader_idle_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="Seconds the reader of an answer may pause."
    )
    reader_min_bytes_per_s: float = Field(
        4096.0, ge=0, le=1e9, description="Least average rate of a reader, in bytes per second."
    )
    drain_timeout_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Seconds for which the rest of a refused upload is swallowed.",
    )
    drain_bytes: int = Field(
        1 << 30, ge=0, le=1 << 40, description="Bytes of a refused upload that are swallowed."
    )
    keep_alive_s: int = Field(
        3600, ge=1, le=86_400, description="Seconds a quiet connection stays open."
    )
    shutdown_timeout_s: int = Field(
        30, ge=1, le=3600, description="Seconds that requests in flight get to end at a stop."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    log_format: Literal["json", "console"] = Field(
        "json", description="json: one object a line; console: for people."
    )

    @model_validator(mode="after")
    def _has_a_folder(self) -> "Settings":
        """Every creation would be refused otherwise."""
        if self.durability != "none" and self.data_dir is None:
            raise ValueError(
                f"GRADPOST_DURABILITY is {self.durability} and there is no folder for it; set "
                "GRADPOST_DATA_DIR too"
            )
        return self

    @field_validator("data_dir", mode="before")
    @classmethod
    def _no_folder(cls, value: Any) -> Any:
        """An empty variable means none."""
        return value or None

    @field_validator("cors_origins", "warm_rules", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """An environment variable holds names separated by commas, not JSON."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("warm_rules")
    @classmethod
    def _rules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """A misspelt rule can never be loaded, and the server would never be ready."""
        for rule in value:
            if rule not in RULES:
                near = difflib.get_close_matches(rule, RULES, 1)
                advice = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(RULES)}"
                raise ValueError(f"there is no rule {rule!r}; {advice}")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: write scheme://host[:port] with no path, or *"
                )
        return value

    @field_validator("api_key")
    @classmethod
    def _key(cls, value: SecretStr | None) -> SecretStr | None:
        """An empty variable means no key; one that no header can carry is refused here."""
        if value is None or not value.get_secret_value():
            return None
        if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
            raise ValueError("a key is printable ASCII without spaces")
        return value
