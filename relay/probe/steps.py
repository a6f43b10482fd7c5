"""The sequence of a probe: Binding, a bare Allocate, Allocate, the steps of each relayed address, and Refresh to delete."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from relay.core.addresses import Family, SocketAddress, show
from relay.core.attributes import XOR_MAPPED_ADDRESS
from relay.core.credentials import Credential
from relay.core.stun import Method
from relay.probe.allocation import TRANSPORT, Allocations, allocated_words
from relay.probe.errors import ProbeError, printable
from relay.probe.relayed import RelayedAddress, RelayedSteps, Watcher
from relay.probe.results import Allocated, Bound, Outcome, Report, Step, StepName, failure
from relay.probe.target import Target
from relay.probe.traffic import Pace, Traffic
from relay.probe.transaction import (
    UNAUTHENTICATED,
    Answer,
    ChallengedError,
    Patience,
    StunClient,
    TurnClient,
    open_socket,
)

FIRST_CHANNEL = 0x4000

_ADDRESSES_TRIED = 4
_SHORTEST_WAIT = 2.0
_FAREWELL = 2.0
"""Seconds for the Refresh that deletes, if the probe is interrupted or the server fell silent: nobody wants to wait then."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is probed."""

    credential: Credential | None = None
    """None to try only what needs none."""
    pace: Pace = field(default_factory=Pace)
    patience: Patience = field(default_factory=Patience)


class Probe:
    """Takes the steps of one probe, each bounded in time, and sums them up."""

    def __init__(self, settings: Settings, watcher: Watcher) -> None:
        self._settings = settings
        self._watcher = watcher
        self._steps: list[Step] = []
        self._traffic: dict[Family, Traffic] = {}
        self._bound: Bound | None = None
        self._allocated: Allocated | None = None
        self._realm: str | None = None

    def run(self, target: Target, addresses: Sequence[SocketAddress]) -> Report:
        """Probe the first of a server's addresses that answers.

        Args:
            target: the server, as it was written.
            addresses: its addresses, in the order in which to try them; at least one.
        """
        server = None
        with contextlib.ExitStack() as stack:
            stun = self._find(addresses[:_ADDRESSES_TRIED], stack)
            if stun is not None:
                server = stun.server
                turn = TurnClient(stun, self._settings.credential)
                self._use(turn, Allocations(turn, self._settings.credential, stack))
        return Report(
            str(target), server, tuple(self._steps), self._bound, self._realm, self._allocated, self._traffic.copy()
        )

    def _find(self, addresses: Sequence[SocketAddress], stack: contextlib.ExitStack) -> StunClient | None:
        """Find the first address that answers Binding; its socket is closed with ``stack``."""
        self._watcher.begin(StepName.BINDING.label)
        patience = self._settings.patience
        # All addresses together get about the time of one step.
        share = min(patience.total, max(patience.total / len(addresses), _SHORTEST_WAIT))
        errors: list[ProbeError] = []
        for address in addresses:
            try:
                opened = stack.enter_context(contextlib.closing(open_socket(address)))
                answer = StunClient(opened, address, patience._replace(total=share)).request(Method.BINDING, ())
                self._bound = Bound(answer.demand(XOR_MAPPED_ADDRESS), answer.rtt)
            except ProbeError as error:
                errors.append(error)
            else:
                self._add(StepName.BINDING, _bound_words(self._bound, answer, errors))
                return StunClient(opened, address, patience)
        found = "; ".join(str(error) for error in errors)
        self._steps.append(Step(StepName.BINDING, Outcome.FAILED, found, None, errors[0].advice, errors[0].code))
        return None

    def _use(self, turn: TurnClient, allocations: Allocations) -> None:
        """Do what a client does, and leave no allocation behind, whatever happens."""
        within: float | None = _FAREWELL
        try:
            if self._is_challenged(turn, allocations) and self._has_credential() and self._allocate(allocations):
                self._relay(allocations)
                within = None
        finally:
            self._delete(allocations, within)

    def _is_challenged(self, turn: TurnClient, allocations: Allocations) -> bool:
        """Send the Allocate that a server must refuse, and learn its realm."""
        self._watcher.begin(StepName.CHALLENGE.label)
        try:
            turn.stun.request(Method.ALLOCATE, (TRANSPORT,))
        except ChallengedError as error:
            if error.code == UNAUTHENTICATED:
                turn.challenge = error.challenge
                self._realm = error.challenge.realm
                self._add(StepName.CHALLENGE, f"401 without credentials, as it should be; realm {printable(self._realm)}")
                return True
            self._steps.append(failure(StepName.CHALLENGE, error))
        except ProbeError as error:
            self._steps.append(failure(StepName.CHALLENGE, error))
        else:
            allocations.note(turn)
            detail = "Allocate without credentials was answered with success"
            advice = "anyone can relay through this server: make it ask for credentials"
            self._steps.append(Step(StepName.CHALLENGE, Outcome.FAILED, detail, advice=advice))
        return False

    def _has_credential(self) -> bool:
        if self._settings.credential is not None:
            return True
        detail = "this and what follows needs --username and --password, or --relay-secret-file"
        self._steps.append(Step(StepName.ALLOCATE, Outcome.SKIPPED, detail))
        return False

    def _allocate(self, allocations: Allocations) -> bool:
        self._watcher.begin(StepName.ALLOCATE.label)
        try:
            self._allocated = allocations.make()
        except ProbeError as error:
            self._steps.append(failure(StepName.ALLOCATE, error))
            return False
        self._add(StepName.ALLOCATE, allocated_words(self._allocated))
        return True

    def _relay(self, allocations: Allocations) -> None:
        relayed_addresses = allocations.made.relayed_addresses if allocations.made else {}
        for index, (family, address) in enumerate(relayed_addresses.items()):
            channels = (FIRST_CHANNEL + 2 * index, FIRST_CHANNEL + 2 * index + 1)
            relayed = RelayedAddress(family, address, channels)
            path = RelayedSteps(allocations.clients[family], relayed, self._settings.pace, self._watcher)
            path.take()
            self._steps += path.steps
            if path.traffic is not None:
                self._traffic[family] = path.traffic

    def _delete(self, allocations: Allocations, within: float | None) -> None:
        """Delete the allocations, if there may be some.

        Args:
            allocations: to be deleted.
            within: seconds for each; None for what the client's patience says.
        """
        if not allocations.to_delete:
            return
        self._watcher.begin(StepName.REFRESH.label)
        try:
            allocations.delete(within)
        except ProbeError as error:
            self._steps.append(failure(StepName.REFRESH, error))
        else:
            self._add(StepName.REFRESH, "LIFETIME 0 deleted all that was allocated")

    def _add(self, name: StepName, detail: str) -> None:
        self._steps.append(Step(name, Outcome.OK, detail))


def _bound_words(bound: Bound, answer: Answer, errors: Sequence[ProbeError]) -> str:
    words = f"this machine is {show(bound.mapped_address)}, RTT {bound.rtt * 1e3:.2f} ms"
    if answer.transmissions > 1:
        words += f" (sent {answer.transmissions} times)"
    return "; ".join((words, *(str(error) for error in errors)))
