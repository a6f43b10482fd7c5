"""What a probe has found out."""

from dataclasses import dataclass
from enum import StrEnum

from relay.core.addresses import Family, SocketAddress
from relay.probe.errors import ProbeError
from relay.probe.traffic import Traffic


class StepName(StrEnum):
    """The steps of a probe in their order, named as in the JSON report."""

    BINDING = "binding"
    CHALLENGE = "challenge"
    ALLOCATE = "allocate"
    CHANNEL_BIND = "channel_bind"
    PEER_PATH = "peer_path"
    PACKETS = "packets"
    REFRESH = "refresh"

    @property
    def label(self) -> str:
        """The name for people, spelt as in the RFC where it has one."""
        return _LABELS[self]


_LABELS = {
    StepName.BINDING: "Binding",
    StepName.CHALLENGE: "Challenge",
    StepName.ALLOCATE: "Allocate",
    StepName.CHANNEL_BIND: "ChannelBind",
    StepName.PEER_PATH: "Peer path",
    StepName.PACKETS: "Packets",
    StepName.REFRESH: "Refresh",
}


class Outcome(StrEnum):
    """How a step went."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Step:
    """One step, and how it went."""

    name: StepName
    outcome: Outcome
    detail: str
    """What was found, as part of a sentence."""
    family: Family | None = None
    """Whose relayed address it was about; None for the steps before there is one."""
    advice: str = ""
    """What to do, if it failed."""
    code: int | None = None
    """The error code that the server answered with."""

    @property
    def label(self) -> str:
        """The name for people."""
        return self.name.label if self.family is None else f"{self.name.label} {self.family}"


def failure(name: StepName, error: ProbeError, family: Family | None = None) -> Step:
    """Make the step that an error ended."""
    return Step(name, Outcome.FAILED, str(error), family, error.advice, error.code)


@dataclass(frozen=True, slots=True)
class Bound:
    """What Binding told."""

    mapped_address: SocketAddress
    """This machine, as the server sees it."""
    rtt: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class Allocated:
    """What Allocate told."""

    relayed_addresses: dict[Family, SocketAddress]
    missing_families: dict[Family, int]
    """The error code for each family that the server gave no address of."""
    lifetime: int
    """Seconds."""
    software: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """All of it."""

    target: str
    """The server as the operator wrote it."""
    server: SocketAddress | None
    """The address that answered; None if none did."""
    steps: tuple[Step, ...]
    bound: Bound | None
    realm: str | None
    allocated: Allocated | None
    traffic: dict[Family, Traffic]

    @property
    def failures(self) -> tuple[Step, ...]:
        """The steps that failed, in order."""
        return tuple(step for step in self.steps if step.outcome is Outcome.FAILED)
