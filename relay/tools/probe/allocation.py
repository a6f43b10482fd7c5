"""Allocate: relayed addresses of both families, with or without the server's support of dual allocations."""

import contextlib
from dataclasses import dataclass, field

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
from relay.core.errors import ErrorCode
from relay.core.stun import Method
from relay.tools.probe.client import AttributeValue, ProbeError, RefusedError, TurnClient, demand, printable, read

UDP = 17
"""Transport protocol number (RFC 8656 §18.7)."""

TRANSPORT = (REQUESTED_TRANSPORT, UDP)

# Servers without dual allocations may reject them as malformed (400), unknown (420) or unsupported (440).
_DUAL_REFUSALS = (400, 420, 440)
# With these codes, or without a code, an Allocate for the missing family alone may still succeed.
_INCONCLUSIVE = (None, 400, 420)


@dataclass(slots=True)
class ProbeAllocations:
    """Allocations of a probe: a dual allocation, or an allocation per family if the server has no dual allocations."""

    client: TurnClient
    """Client of the first allocation."""
    stack: contextlib.ExitStack
    """Closes the socket of a second client."""
    relayed_addresses: dict[Family, SocketAddress] = field(default_factory=dict)
    missing_families: dict[Family, int] = field(default_factory=dict)
    """Error codes of families without an address."""
    lifetime: int = 0
    """Seconds."""
    software: str | None = None
    clients: dict[Family, TurnClient] = field(default_factory=dict)
    """Client that owns the relayed address of a family."""
    to_delete: list[TurnClient] = field(default_factory=list)
    """Clients that may have an allocation."""

    def make(self) -> str:
        """Request relayed addresses of both families, and return a summary.

        Raise `ProbeError` if the server made no allocation.

        A server that does not know ADDITIONAL-ADDRESS-FAMILY ignores it (RFC 8489 §14). An example is coturn 4.6, which has
        the attribute under another number.
        """
        refusal: RefusedError | None = None
        try:
            self._allocate(self.client, (ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
        except RefusedError as error:
            if error.code not in _DUAL_REFUSALS:
                raise
        for family in Family:
            if family in self.clients or self.missing_families.get(family) not in _INCONCLUSIVE:
                continue
            client = self.client
            if self.clients:
                client = self.stack.enter_context(TurnClient(client.server, client.timeout, client.credential))
            # IPv4 is the default family, which old servers know without an attribute.
            attributes = ((REQUESTED_ADDRESS_FAMILY, family),) if family is Family.IPV6 else ()
            try:
                self._allocate(client, *attributes)
            except RefusedError as error:
                self.missing_families[family] = error.code
                refusal = refusal or error
        if refusal is not None and not self.clients:
            raise refusal
        parts = [
            f"{family}: {show(self.relayed_addresses[family])}"
            if family in self.relayed_addresses
            else f"{family}: not served ({self.missing_families.get(family, 'no reason given')})"
            for family in Family
        ]
        software = [f"software {printable(self.software)}"] if self.software else []
        return ", ".join((*parts, f"lifetime {self.lifetime} s", *software))

    def delete(self, within: float | None) -> str:
        """Delete all allocations, each within some seconds. Raise `ProbeError` if the server did not confirm a deletion."""
        failed: ProbeError | None = None
        for client in self.to_delete:
            try:
                client.request(Method.REFRESH, ((LIFETIME, 0),), within=within)
            except ProbeError as error:
                # 437 is the response to a retransmitted deletion if the first response was lost.
                if error.code != ErrorCode.ALLOCATION_MISMATCH:
                    failed = error
        if failed is not None:
            raise failed
        return "deleted all allocations (LIFETIME 0)"

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
        self.lifetime, self.software = demand(message, LIFETIME), read(message, SOFTWARE)
        self.relayed_addresses |= relayed
        missing |= self.missing_families
        self.missing_families = {family: code for family, code in missing.items() if family not in self.relayed_addresses}
