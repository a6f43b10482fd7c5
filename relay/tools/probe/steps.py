"""Sequence of a probe: Binding, unauthenticated Allocate, Allocate, steps per relayed address, and Refresh to delete."""

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

from relay.core.addresses import Family, SocketAddress, family_of, show, socket_address
from relay.core.attributes import CHANNEL_NUMBER, XOR_MAPPED_ADDRESS, XOR_PEER_ADDRESS
from relay.core.credentials import Credential
from relay.core.errors import ErrorCode
from relay.core.stun import Method
from relay.net.endpoint import Endpoint
from relay.tools.probe.allocation import TRANSPORT, ProbeAllocations
from relay.tools.probe.client import (
    NoRouteError,
    ProbeError,
    RefusedError,
    SkippedError,
    TurnClient,
    demand,
    printable,
    unreachable,
)
from relay.tools.probe.icmp import forbid_fragments
from relay.tools.probe.report import Outcome, Report, Step, StepName, Watcher
from relay.tools.probe.traffic import CHANNEL_HEADER, Exchange, PacketPlan, Traffic

FIRST_CHANNEL = 0x4000

_ADDRESSES_TRIED = 4
_SHORTEST_WAIT = 2.0
_DELETE_TIMEOUT = 2.0
"""Seconds for the deletion if the probe was interrupted or the server has stopped responding."""

_MTUS = (576, 1024, 1200, *range(1280, 1500, 10), 1454, 1462, 1472, 1476, 1492, 1500, 4000, 8900, 9001)
"""Bytes of usual MTUs: tunnels and PPPoE have 1280 to 1492, Ethernet 1500, clouds up to 9001."""

_LEAST_MTU = 1280
"""Bytes. IPv6 requires it (RFC 8200 §5)."""

_HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
"""Bytes of the headers of IP and UDP."""

_LOOPED = "looped through the relayed address"


def probe(
    target: Endpoint,
    addresses: Sequence[SocketAddress],
    credential: Credential | None,
    plan: PacketPlan | None,
    timeout: float,
    watcher: Watcher,
) -> Report:
    """Probe the first address that responds. Each step has a time limit.

    Args:
        target: the server as given on the command line.
        addresses: its addresses, in the order of attempts; at least one.
        credential: the credential; None to test only the steps without credentials.
        plan: number, rate and size of packets; None to test only Binding, for a server without TURN.
        timeout: seconds for the response in each step.
        watcher: receives each step.
    """
    report = Report(str(target), watcher)
    with contextlib.ExitStack() as stack:
        client = _find(addresses[:_ADDRESSES_TRIED], timeout, report, stack)
        if client is None or plan is None:
            return report
        client.credential = credential
        allocations = ProbeAllocations(client, stack)
        within: float | None = _DELETE_TIMEOUT
        try:
            if report.take(StepName.CHALLENGE, lambda: _challenge(client, allocations, report)) and report.take(
                StepName.ALLOCATE, lambda: _allocate(client, allocations, report)
            ):
                for at, (family, address) in enumerate(sorted(allocations.relayed_addresses.items())):
                    RelayedSteps(allocations.clients[family], address, FIRST_CHANNEL + 2 * at, plan, report).take()
                within = None
        finally:
            if allocations.to_delete:
                report.take(StepName.REFRESH, lambda: allocations.delete(within))
    return report


def _find(
    addresses: Sequence[SocketAddress], timeout: float, report: Report, stack: contextlib.ExitStack
) -> TurnClient | None:
    """Return a client of the first address that responds to Binding. ``stack`` closes its socket."""
    # All addresses share the time limit of a step.
    share = min(timeout, max(timeout / len(addresses), _SHORTEST_WAIT))
    errors: list[ProbeError] = []
    for address in addresses:
        try:
            client = stack.enter_context(TurnClient(address, share))
            answer = client.exchange(Method.BINDING)
            report.mapped_address = demand(answer.message, XOR_MAPPED_ADDRESS)
        except ProbeError as error:
            errors.append(error)
            continue
        report.server, report.binding_rtt = address, answer.rtt
        words = f"this machine is {show(report.mapped_address)}, RTT {answer.rtt * 1e3:.2f} ms"
        if answer.transmissions > 1:
            words += f" (sent {answer.transmissions} times)"
        report.add(Step(StepName.BINDING, Outcome.OK, "; ".join((words, *map(str, errors)))))
        client.timeout = timeout
        return client
    report.fail(StepName.BINDING, ProbeError("; ".join(map(str, errors)), errors[0].advice, errors[0].code))
    return None


def _challenge(client: TurnClient, allocations: ProbeAllocations, report: Report) -> str:
    """Send an Allocate that a server must reject, to learn its realm."""
    try:
        client.exchange(Method.ALLOCATE, (TRANSPORT,))
    except RefusedError as error:
        if error.code != ErrorCode.UNAUTHENTICATED or error.challenge is None:
            raise
        client.challenge, report.realm = error.challenge, error.challenge.realm
        return f"401 without credentials, as expected; realm {printable(report.realm)}"
    allocations.to_delete.append(client)
    advice = "anyone can relay through this server: configure it to require credentials"
    raise ProbeError("Allocate without credentials succeeded", advice)


def _allocate(client: TurnClient, allocations: ProbeAllocations, report: Report) -> str:
    if client.credential is None:
        raise SkippedError("this step and the following need --username and --password, or --relay-secret-file")
    finding = allocations.make()
    report.allocated = allocations
    return finding


@dataclass(slots=True)
class RelayedSteps:
    """Run of the steps.

    The peer is a second socket of this machine. If the server rejects the peer, or packets do not arrive, the packets are
    looped: a channel leads to the allocation's own relayed address, so each packet returns to the client.
    """

    client: TurnClient
    """Owner of the relayed address."""
    address: SocketAddress
    """The relayed address."""
    number: int
    """Number of the channel to the peer. The next is of the channel to the relayed address itself."""
    plan: PacketPlan
    report: Report
    is_silent: bool = False
    """Whether the announced address does not respond to Binding."""

    @property
    def family(self) -> Family:
        """Family of the relayed address."""
        return family_of(self.address)

    def take(self) -> None:
        """Run all steps."""
        if self._goes_through_peer():
            return
        self.number += 1
        if self._bind(self.address):
            self._judge(self._exchange(self.plan, None), None)
        else:
            self._add(StepName.PACKETS, Outcome.SKIPPED, "no channel leads anywhere")

    def _goes_through_peer(self) -> bool:
        """Test a peer. Return false if packets have to be looped; the report has the reason."""
        server = self.client.server
        if family_of(server) is not self.family:
            server = socket_address(self.address[0], server[1])
        try:
            with TurnClient(server, self.client.timeout) as peer:
                address = self._address_of(peer)
                if self._bind(address):
                    traffic = self._send_through(peer.socket)
                    detail = f"through the server to another socket of this machine, {show(address)}"
                    self._add(StepName.PEER_PATH, Outcome.OK, detail)
                    self._judge(traffic, peer.socket)
                return True
        except NoRouteError as error:
            # The server may work, unless it announces an address that clients have no route to.
            advice = self._wrong_address()
            outcome = Outcome.FAILED if advice else Outcome.SKIPPED
            self._add(StepName.PEER_PATH, outcome, f"{error}; {_LOOPED}", advice)
        except ProbeError as error:
            self.report.fail(StepName.PEER_PATH, error, self.family)
        return False

    def _send_through(self, peer: socket.socket) -> Traffic:
        """Send packets through a bound peer. Raise `ProbeError` if none arrives."""
        try:
            peer.connect(self.address)
        except OSError as error:
            raise unreachable(self.address, error) from error
        traffic = self._exchange(self.plan, peer)
        if any(way.received for way in traffic.directions):
            return traffic
        finding = "no packet arrived in either direction"
        advice = (
            f"the relayed ports are unreachable from here: is {self.address[0]} the server's public address?"
            " does a firewall block its relayed UDP ports? is this machine behind a symmetric NAT?"
        )
        if traffic.rejection is not None:
            finding, advice = str(traffic.rejection), traffic.rejection.advice
        raise ProbeError(f"{finding}; {_LOOPED}", self._wrong_address() or advice)

    def _wrong_address(self) -> str:
        """Return advice if the announced address is not the probed address, or does not respond; else nothing."""
        announced, reached = self.address[0], self.client.server[0]
        option = f"--public-ip{'4' if self.family is Family.IPV4 else '6'}-addr"
        if family_of(self.client.server) is not self.family:
            return f"the server does not respond at {announced}: correct or remove its {option}" if self.is_silent else ""
        if announced == reached:
            return ""
        return f"the server announces {announced}, but responds at {reached}: give it {option} {reached}"

    def _address_of(self, peer: TurnClient) -> SocketAddress:
        """Return the address at which the server reaches the peer."""
        try:
            return demand(peer.exchange(Method.BINDING).message, XOR_MAPPED_ADDRESS)
        except ProbeError as error:
            # A server may relay a family on which it does not listen. Then the local address is the best guess. The
            # packets show whether the guess is right.
            if isinstance(error, NoRouteError) or peer.server == self.client.server:
                raise
            self.is_silent = True
            local: SocketAddress = peer.socket.getsockname()
            return local

    def _bind(self, peer: SocketAddress) -> bool:
        """Bind a channel. Return false on failure; the report has the failure.

        Raises:
            SkippedError: the server's policy forbids the peer (403), and the peer is not the relayed address itself.
        """
        to = "the relayed address itself" if peer == self.address else show(peer)
        try:
            self.client.request(Method.CHANNEL_BIND, ((CHANNEL_NUMBER, self.number), (XOR_PEER_ADDRESS, peer)))
        except ProbeError as error:
            failure = error
            if error.code == ErrorCode.FORBIDDEN:
                if peer != self.address:
                    raise SkippedError(f"the server rejects this machine ({to}) as a peer (403); {_LOOPED}") from error
                advice = "the server also rejects its own relayed addresses as peers: probe from a machine that it accepts"
                failure = ProbeError(f"{error} for {to}", advice, error.code)
            self.report.fail(StepName.CHANNEL_BIND, failure, self.family)
            return False
        self._add(StepName.CHANNEL_BIND, Outcome.OK, f"0x{self.number:04X} to {to}")
        return True

    def _exchange(self, plan: PacketPlan, peer: socket.socket | None) -> Traffic:
        return Exchange(self.client.socket, self.number, peer, plan).run()

    def _judge(self, traffic: Traffic, peer: socket.socket | None) -> None:
        """Add the step of the packets. If they arrive, try larger packets."""
        self.report.traffic[self.family] = traffic
        lossiest = max(traffic.directions, key=lambda way: way.loss)
        if lossiest.loss <= self.plan.max_loss:
            self._add(StepName.PACKETS, Outcome.OK, traffic.words())
            self._measure_mtu(peer)
            return
        if traffic.rejection is not None:
            advice = f"{traffic.rejection}: {traffic.rejection.advice}"
        elif lossiest.received:
            advice = f"loss over {self.plan.max_loss:.1%}: is the server or its link overloaded? try a lower --rate"
        elif traffic.to_peer is None:
            advice = (
                "packets to the server's own relayed address are lost, for example at a NAT without hairpin: probe from a "
                "machine that it accepts as a peer"
            )
        elif not traffic.to_peer.received:
            advice = "no packet reached the peer: does a firewall block packets from the relayed port?"
        elif traffic.to_client is not None and not traffic.to_client.received:
            advice = "no packet reached the client: does a firewall block packets to the relayed port?"
        else:
            advice = "no packet made the round trip, although both directions work: see the server's log"
        self._add(StepName.PACKETS, Outcome.FAILED, traffic.words(), advice)

    def _measure_mtu(self, peer: socket.socket | None) -> None:
        """Send packets that no router may fragment, and find the longest that makes the round trip."""
        ends = [self.client.socket, *([] if peer is None else [peer])]
        # A packet of IPv6 to the peer may be longer than ChannelData of IPv4.
        headers = max(_HEADERS[end.family] + CHANNEL_HEADER.size * (end is not peer) for end in ends)
        # Three packets of each size, because some loss is normal.
        plan = replace(self.plan, sizes=tuple(size - headers for size in _MTUS), count=3 * len(_MTUS), rate=100)
        for end in ends:
            forbid_fragments(end, forbidden=True)
        largest = self._exchange(plan, peer).largest
        for end in ends:
            forbid_fragments(end, forbidden=False)
        mtu = self.report.path_mtu[self.family] = largest + headers if largest else 0
        if mtu >= _LEAST_MTU:
            self._add(StepName.PATH_MTU, Outcome.OK, f"{mtu} bytes, of which {largest} are payload")
            return
        advice = f"clients lose or fragment large packets: raise the MTU on the way to {_LEAST_MTU} or more"
        self._add(StepName.PATH_MTU, Outcome.FAILED, f"{mtu} bytes" if mtu else "no large packet passed whole", advice)

    def _add(self, name: StepName, outcome: Outcome, detail: str, advice: str = "") -> None:
        self.report.add(Step(name, outcome, detail, self.family, advice))
