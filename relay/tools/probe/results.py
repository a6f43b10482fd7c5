"""Results of a probe."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from relay.core.addresses import Family, SocketAddress
from relay.tools.probe.client import ProbeError
from relay.tools.probe.traffic import Traffic


class StepName(StrEnum):
    """Steps of a probe, in their order. The values are names in the JSON report."""

    BINDING = "binding"
    CHALLENGE = "challenge"
    ALLOCATE = "allocate"
    CHANNEL_BIND = "channel_bind"
    PEER_PATH = "peer_path"
    PACKETS = "packets"
    PATH_MTU = "path_mtu"
    REFRESH = "refresh"


_LABELS = {StepName.CHANNEL_BIND: "ChannelBind", StepName.PATH_MTU: "Path MTU"}


class Outcome(StrEnum):
    """Outcome of a step."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Step:
    """Result of a step."""

    name: StepName
    outcome: Outcome
    detail: str
    """The finding, as part of a sentence."""
    family: Family | None = None
    """Family of the relayed address; None for steps without a relayed address."""
    advice: str = ""
    """The fix of a failure."""
    code: int | None = None
    """The error code of the response."""

    @property
    def label(self) -> str:
        """The name for people: the name in the RFC if there is one."""
        words = _LABELS.get(self.name) or self.name.replace("_", " ").capitalize()
        return words if self.family is None else f"{words} {self.family}"


@dataclass(slots=True)
class Allocated:
    """Result of Allocate."""

    relayed_addresses: dict[Family, SocketAddress]
    missing_families: dict[Family, int]
    """Error codes of families without an address."""
    lifetime: int = 0
    """Seconds."""
    software: str | None = None


Watcher: TypeAlias = Callable[["Report", Step], object]
"""Receives the report so far, and its latest step."""


@dataclass(slots=True)
class Report:
    """Result of a probe so far."""

    target: str
    """The server as given on the command line."""
    watcher: Watcher
    server: SocketAddress | None = None
    """The address that responded; None if there was no response."""
    mapped_address: SocketAddress | None = None
    """Address of this machine as the server sees it."""
    binding_rtt: float | None = None
    """Seconds."""
    realm: str | None = None
    allocated: Allocated | None = None
    traffic: dict[Family, Traffic] = field(default_factory=dict)
    path_mtu: dict[Family, int] = field(default_factory=dict)
    """Bytes of the longest IP packet that passed whole, by family of the relayed address."""
    steps: list[Step] = field(default_factory=list)

    @property
    def failures(self) -> list[Step]:
        """The steps that failed, in order."""
        return [step for step in self.steps if step.outcome is Outcome.FAILED]

    def add(self, step: Step) -> None:
        """Add the result of a step."""
        self.steps.append(step)
        self.watcher(self, step)

    def fail(self, name: StepName, error: ProbeError, family: Family | None = None) -> None:
        """Add a step that ended with an error."""
        self.add(Step(name, Outcome.FAILED, str(error), family, error.advice, error.code))

    @contextlib.contextmanager
    def step(self, name: StepName, family: Family | None = None) -> Iterator[None]:
        """Add a failed step if the context ends with a `ProbeError`."""
        try:
            yield
        except ProbeError as error:
            self.fail(name, error, family)
