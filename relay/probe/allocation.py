"""Allocate: relayed addresses of both families from one server, whatever it knows of dual allocations."""

import contextlib
from collections.abc import Iterator

from relay.core.addresses import Family, SocketAddress, family_of, show
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    ADDRESS_ERROR_CODE,
    LIFETIME,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    SOFTWARE,
    XOR_RELAYED_ADDRESS,
    MalformedAttributeError,
)
from relay.core.credentials import Credential
from relay.core.stun import Method
from relay.probe.errors import BadAnswerError, ProbeError, RefusedError, printable
from relay.probe.results import Allocated
from relay.probe.transaction import Answer, AttributeValues, StunClient, TurnClient, open_socket, read

UDP = 17
"""The transport that is relayed (RFC 8656 §18.7)."""

TRANSPORT = (REQUESTED_TRANSPORT, UDP)

_NOT_SERVED = 440
_GONE = 437

# Servers that don't know dual allocations may refuse them as bad (400), not understood (420) or not served (440).
_DUAL_REFUSALS = (400, 420, _NOT_SERVED)
# What a family may be missing with, without the server having said that it doesn't serve it.
_UNSAID = (None, 400, 420)


class Allocations:
    """The allocations of one probe: one for both families, or one for each where the server won't have that.

    Args:
        turn: has the first allocation.
        credential: for the second one.
        stack: closes the socket of the second one.
    """

    def __init__(self, turn: TurnClient, credential: Credential | None, stack: contextlib.ExitStack) -> None:
        self.made: Allocated | None = None
        """What the server told about them."""
        self.clients: dict[Family, TurnClient] = {}
        """Whose allocation has the relayed address of a family."""
        self._first = turn
        self._credential = credential
        self._stack = stack
        self.to_delete: list[TurnClient] = []
        """Clients that may have an allocation."""

    def note(self, turn: TurnClient) -> None:
        """Take note that a client may have an allocation now, which `delete` is to delete."""
        if turn not in self.to_delete:
            self.to_delete.append(turn)

    def make(self) -> Allocated:
        """Ask for relayed addresses of both families.

        Raises:
            ProbeError: there is no allocation.
        """
        try:
            made = self._make_first()
        except RefusedError as error:
            if error.code != _NOT_SERVED:
                raise
            # The server may have no IPv4, which is what it is asked for if nothing is said.
            made = self._allocate(self._first, ((REQUESTED_ADDRESS_FAMILY, Family.IPV6),), {Family.IPV4: _NOT_SERVED})
        for family in Family:
            if family not in made.relayed_addresses and made.missing_families.get(family) in _UNSAID:
                made = self._make_second(family, made)
        self.made = made
        return made

    def delete(self, within: float | None) -> None:
        """Delete all that may be there.

        Args:
            within: seconds for each; None for what the client's patience says.

        Raises:
            ProbeError: the server did not confirm it, of one at least.
        """
        failed: ProbeError | None = None
        for turn in self.to_delete:
            try:
                turn.request(Method.REFRESH, ((LIFETIME, 0),), within=within)
            except ProbeError as error:
                # 437 answers a deletion that was repeated, as the answer to the first one was lost.
                if error.code != _GONE:
                    failed = error
        if failed is not None:
            raise failed

    def _make_first(self) -> Allocated:
        try:
            return self._allocate(self._first, ((ADDITIONAL_ADDRESS_FAMILY, Family.IPV6),), {})
        except RefusedError as error:
            if error.code not in _DUAL_REFUSALS:
                raise
            refused = {Family.IPV6: error.code}
        return self._allocate(self._first, (), refused)

    def _make_second(self, family: Family, made: Allocated) -> Allocated:
        """Ask for the family that a server left out without saying that it doesn't serve it.

        One that doesn't know ADDITIONAL-ADDRESS-FAMILY ignores it, as RFC 8489 §14 has it; coturn 4.6 is one, as it has
        the attribute under another number. A second allocation has the other family then.
        """
        server = self._first.stun.server
        opened = self._stack.enter_context(contextlib.closing(open_socket(server)))
        turn = TurnClient(StunClient(opened, server, self._first.stun.patience), self._credential)
        try:
            second = self._allocate(turn, ((REQUESTED_ADDRESS_FAMILY, family),), {})
        except RefusedError as error:
            return _merge(made, {}, {family: error.code})
        return _merge(made, second.relayed_addresses, {})

    def _allocate(self, turn: TurnClient, attributes: AttributeValues, refused: dict[Family, int]) -> Allocated:
        # Until an error says otherwise, there may be an allocation even if no answer comes.
        self.note(turn)
        try:
            allocated = _read(turn.request(Method.ALLOCATE, (TRANSPORT, *attributes)), refused)
        except RefusedError:
            self.to_delete.remove(turn)
            raise
        self.clients |= dict.fromkeys(allocated.relayed_addresses, turn)
        return allocated


def allocated_words(allocated: Allocated) -> str:
    """Sum up allocations for people."""

    def parts() -> Iterator[str]:
        for family in Family:
            if family in allocated.relayed_addresses:
                yield f"{family}: {show(allocated.relayed_addresses[family])}"
            else:
                yield f"{family}: not served ({allocated.missing_families.get(family, 'no reason given')})"
        yield f"lifetime {allocated.lifetime} s"
        if allocated.software:
            yield f"software {printable(allocated.software)}"

    return ", ".join(parts())


def _read(answer: Answer, refused: dict[Family, int]) -> Allocated:
    try:
        relayed = {family_of(address): address for address in answer.message.get_all(XOR_RELAYED_ADDRESS)}
        missing = {error.family: error.code for error in answer.message.get_all(ADDRESS_ERROR_CODE)}
    except MalformedAttributeError as error:
        raise BadAnswerError(f"the answer to Allocate is malformed: {error}", "see the server's log") from error
    if not relayed:
        answer.demand(XOR_RELAYED_ADDRESS)
    allocated = Allocated({}, {}, answer.demand(LIFETIME), read(answer.message, SOFTWARE))
    return _merge(allocated, relayed, refused | missing)


def _merge(made: Allocated, relayed: dict[Family, SocketAddress], missing: dict[Family, int]) -> Allocated:
    """Add addresses, and errors of families that have none."""
    addresses = made.relayed_addresses | relayed
    ordered = {family: addresses[family] for family in Family if family in addresses}
    errors = {family: code for family, code in (made.missing_families | missing).items() if family not in addresses}
    return Allocated(ordered, errors, made.lifetime, made.software)
