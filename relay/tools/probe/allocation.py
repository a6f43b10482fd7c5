"""Allocate: relayed addresses of both families, with or without the server's support of dual allocations."""

import contextlib

from relay.core.addresses import Family, family_of, show
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
from relay.core.stun import Method
from relay.tools.probe.client import (
    AttributeValue,
    ProbeError,
    RefusedError,
    TurnClient,
    demand,
    open_socket,
    printable,
    read,
)
from relay.tools.probe.results import Allocated

UDP = 17
"""Transport protocol number (RFC 8656 §18.7)."""

TRANSPORT = (REQUESTED_TRANSPORT, UDP)

_GONE = 437
# Servers without dual allocations may reject them as malformed (400), unknown (420) or unsupported (440).
_DUAL_REFUSALS = (400, 420, 440)
# With these codes, or without a code, an Allocate for the missing family alone may still succeed.
_INCONCLUSIVE = (None, 400, 420)


class ProbeAllocations:
    """Allocations of a probe: a dual allocation, or an allocation per family if the server has no dual allocations.

    Args:
        client: client of the first allocation.
        stack: closes the socket of a second client.
    """

    def __init__(self, client: TurnClient, stack: contextlib.ExitStack) -> None:
        self.made = Allocated({}, {})
        """Result of `make`."""
        self.clients: dict[Family, TurnClient] = {}
        """Client that owns the relayed address of a family."""
        self.to_delete: list[TurnClient] = []
        """Clients that may have an allocation."""
        self._client = client
        self._stack = stack

    def make(self) -> Allocated:
        """Request relayed addresses of both families. Raise `ProbeError` if the server made no allocation.

        A server that does not know ADDITIONAL-ADDRESS-FAMILY ignores it (RFC 8489 §14). An example is coturn 4.6, which has
        the attribute under another number.
        """
        refusal: RefusedError | None = None
        try:
            self._allocate(self._client, (ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
        except RefusedError as error:
            if error.code not in _DUAL_REFUSALS:
                raise
        for family in Family:
            if family in self.clients or self.made.missing_families.get(family) not in _INCONCLUSIVE:
                continue
            # IPv4 is the default family, which old servers know without an attribute.
            attributes = ((REQUESTED_ADDRESS_FAMILY, family),) if family is Family.IPV6 else ()
            try:
                self._allocate(self._free_client(), *attributes)
            except RefusedError as error:
                self.made.missing_families[family] = error.code
                refusal = refusal or error
        if refusal is not None and not self.clients:
            raise refusal
        return self.made

    def delete(self, within: float | None) -> None:
        """Delete all allocations, each within some seconds. Raise `ProbeError` if the server did not confirm a deletion."""
        failed: ProbeError | None = None
        for client in self.to_delete:
            try:
                client.request(Method.REFRESH, ((LIFETIME, 0),), within=within)
            except ProbeError as error:
                # 437 is the response to a retransmitted deletion if the first response was lost.
                if error.code != _GONE:
                    failed = error
        if failed is not None:
            raise failed

    def _free_client(self) -> TurnClient:
        first = self._client
        if not self.clients:
            return first
        opened = self._stack.enter_context(contextlib.closing(open_socket(first.server)))
        return TurnClient(opened, first.server, first.timeout, first.credential)

    def _allocate(self, client: TurnClient, *attributes: AttributeValue) -> None:
        # Without a response, there may be an allocation.
        self.to_delete.append(client)
        try:
            message = client.request(Method.ALLOCATE, (TRANSPORT, *attributes)).message
        except RefusedError:
            self.to_delete.remove(client)
            raise
        try:
            relayed = {family_of(address): address for address in message.get_all(XOR_RELAYED_ADDRESS)}
            missing = {error.family: error.code for error in message.get_all(ADDRESS_ERROR_CODE)}
        except MalformedAttributeError as error:
            raise ProbeError(f"the response to Allocate is malformed: {error}", "see the server's log") from error
        if not relayed:
            demand(message, XOR_RELAYED_ADDRESS)
        self.clients |= dict.fromkeys(relayed, client)
        made = self.made
        made.lifetime, made.software = demand(message, LIFETIME), read(message, SOFTWARE)
        addresses = made.relayed_addresses | relayed
        made.relayed_addresses = {family: addresses[family] for family in Family if family in addresses}
        missing |= made.missing_families
        made.missing_families = {family: code for family, code in missing.items() if family not in addresses}


def allocated_words(allocated: Allocated) -> str:
    """Return a summary of allocations for people."""
    relayed, missing = allocated.relayed_addresses, allocated.missing_families
    parts = [
        f"{family}: {show(relayed[family])}"
        if family in relayed
        else f"{family}: not served ({missing.get(family, 'no reason given')})"
        for family in Family
    ]
    software = [f"software {printable(allocated.software)}"] if allocated.software else []
    return ", ".join((*parts, f"lifetime {allocated.lifetime} s", *software))
