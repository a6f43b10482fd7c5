"""The steps that one relayed address goes through: a peer, a channel to it, and packets."""

import contextlib
import socket
from dataclasses import replace
from typing import NamedTuple, Protocol

from relay.core.addresses import Family, SocketAddress, family_of, show, socket_address
from relay.core.attributes import CHANNEL_NUMBER, XOR_MAPPED_ADDRESS, XOR_PEER_ADDRESS
from relay.core.stun import Method
from relay.probe.errors import NoRouteError, ProbeError, RefusedError
from relay.probe.results import Outcome, Step, StepName, failure
from relay.probe.traffic import Exchange, Pace, Traffic
from relay.probe.transaction import StunClient, TurnClient, open_socket, unreachable

FORBIDDEN = 403

TOLERATED_LOSS = 0.1
"""The share of packets, 0–1, above which Packets fails. Some loss is the way of the Internet; this much breaks tunnels."""

_LOOPED = "looped through the relayed address"


class Watcher(Protocol):
    """Is told how far a probe has come."""

    def begin(self, title: str) -> None:
        """Take note that a step begins."""

    def packets(self, sent: int, count: int) -> None:
        """Take note that so many packets out of ``count`` have been sent each way."""


class RelayedAddress(NamedTuple):
    """What is probed here."""

    family: Family
    address: SocketAddress
    channels: tuple[int, int]
    """Two numbers: of a channel to the peer, and of one to the relayed address itself."""


class RelayedSteps:
    """Takes the steps; `steps` and `traffic` have the results so far, also if it is interrupted.

    The peer is a second socket of this machine. If the server won't relay to it, or what it relays doesn't arrive, the
    packets are looped: a channel leads to the allocation's own relayed address, where each packet leaves and comes in.
    """

    def __init__(self, turn: TurnClient, relayed: RelayedAddress, pace: Pace, watcher: Watcher) -> None:
        self.steps: list[Step] = []
        self.traffic: Traffic | None = None
        self._turn = turn
        self._relayed = relayed
        self._pace = pace
        self._watcher = watcher

    def take(self) -> None:
        """Take all the steps."""
        self._begin(StepName.PEER_PATH)
        if self._goes_through_peer():
            return
        if self._bind(self._relayed.channels[1], self._relayed.address):
            self._add(self._judge(self._exchange(self._relayed.channels[1], None)))
        else:
            self._add(Step(StepName.PACKETS, Outcome.SKIPPED, "no channel leads anywhere", self._relayed.family))

    def _goes_through_peer(self) -> bool:
        """Try a peer; False if packets have to be looped, with the reason among the steps."""
        try:
            with contextlib.closing(open_socket(self._peer_server())) as peer:
                address = self._address_of(peer)
                return self._goes_through(peer, address)
        except NoRouteError as error:
            # It says nothing about the server.
            self._skip_peer_path(str(error))
        except ProbeError as error:
            self._add(failure(StepName.PEER_PATH, error, self._relayed.family))
        return False

    def _goes_through(self, peer: socket.socket, address: SocketAddress) -> bool:
        try:
            bound = self._bind(self._relayed.channels[0], address)
        except RefusedError:
            self._skip_peer_path(f"this machine ({show(address)}) is refused as a peer (403)")
            return False
        if not bound:
            return True
        try:
            peer.connect(self._relayed.address)
        except OSError as error:
            raise unreachable(self._relayed.address, error) from error
        traffic = self._exchange(self._relayed.channels[0], peer)
        if traffic.is_silent:
            detail = f"nothing came through, either way; {_LOOPED}"
            advice = (
                f"the relayed ports can't be reached from here: is {self._relayed.address[0]} the server's public address?"
                " does a firewall let its relayed UDP ports through? is this machine behind a symmetric NAT?"
            )
            self._add(Step(StepName.PEER_PATH, Outcome.FAILED, detail, self._relayed.family, advice))
            return False
        detail = f"through the server to another socket of this machine, {show(address)}"
        self._add(Step(StepName.PEER_PATH, Outcome.OK, detail, self._relayed.family))
        self._add(self._judge(traffic))
        return True

    def _peer_server(self) -> SocketAddress:
        """Give the address of which the peer asks its own: the server's, in the family of the relayed address."""
        server = self._turn.stun.server
        if family_of(server) is self._relayed.family:
            return server
        return socket_address(self._relayed.address[0], server[1])

    def _address_of(self, peer: socket.socket) -> SocketAddress:
        """Learn the address at which the server can reach the peer."""
        server = self._peer_server()
        try:
            answer = StunClient(peer, server, self._turn.stun.patience).request(Method.BINDING, ())
            return answer.demand(XOR_MAPPED_ADDRESS)
        except NoRouteError:
            raise
        except ProbeError:
            # A server may relay for a family without listening on it. Then the address on this side of any NAT is the
            # best guess, and the packets tell whether it was right.
            if server == self._turn.stun.server:
                raise
            local: SocketAddress = peer.getsockname()
            return local

    def _bind(self, number: int, peer: SocketAddress) -> bool:
        """Bind a channel; False if that failed, with the failure among the steps.

        Raises:
            RefusedError: policy refuses the peer (403), and it was not the relayed address itself.
        """
        self._begin(StepName.CHANNEL_BIND)
        itself = peer == self._relayed.address
        try:
            self._turn.request(Method.CHANNEL_BIND, ((CHANNEL_NUMBER, number), (XOR_PEER_ADDRESS, peer)))
        except ProbeError as error:
            if isinstance(error, RefusedError) and error.code == FORBIDDEN and not itself:
                raise
            self._add(self._no_channel(error, itself=itself))
            return False
        to = "the relayed address itself" if itself else show(peer)
        self._add(Step(StepName.CHANNEL_BIND, Outcome.OK, f"0x{number:04X} to {to}", self._relayed.family))
        return True

    def _no_channel(self, error: ProbeError, *, itself: bool) -> Step:
        step = failure(StepName.CHANNEL_BIND, error, self._relayed.family)
        if error.code != FORBIDDEN or not itself:
            return step
        advice = "the server refuses its own relayed addresses as peers too: probe from a machine that it accepts as a peer"
        return replace(step, detail=f"{step.detail} for the relayed address itself", advice=advice)

    def _exchange(self, number: int, peer: socket.socket | None) -> Traffic:
        self._begin(StepName.PACKETS)
        self.traffic = Exchange(self._turn.stun.socket, number, peer, self._pace).run(self._watcher.packets)
        return self.traffic

    def _judge(self, traffic: Traffic) -> Step:
        lossiest = max(traffic.directions, key=lambda way: way.loss)
        detail = _words(traffic)
        if lossiest.loss <= TOLERATED_LOSS:
            return Step(StepName.PACKETS, Outcome.OK, detail, self._relayed.family)
        if lossiest.received:
            advice = f"over {TOLERATED_LOSS:.0%} were lost: is the server or its link overloaded? try a lower --rate"
        elif traffic.to_peer is None:
            advice = "the server does not relay to its own relayed addresses: probe from a machine that it accepts as a peer"
        elif not traffic.to_peer.received:
            advice = "nothing got from client to peer: does a firewall stop what the relayed port sends?"
        elif traffic.to_client is not None and not traffic.to_client.received:
            advice = "nothing got from peer to client: does a firewall stop what is sent to the relayed port?"
        else:
            advice = "no packet made the round trip, though both ways work: see the server's log"
        return Step(StepName.PACKETS, Outcome.FAILED, detail, self._relayed.family, advice)

    def _skip_peer_path(self, reason: str) -> None:
        self._add(Step(StepName.PEER_PATH, Outcome.SKIPPED, f"{reason}; {_LOOPED}", self._relayed.family))

    def _begin(self, name: StepName) -> None:
        self._watcher.begin(f"{name.label} {self._relayed.family}")

    def _add(self, step: Step) -> None:
        self.steps.append(step)


def _words(traffic: Traffic) -> str:
    """Sum up packets for people."""
    names = ("looped",) if traffic.to_peer is None else ("to peer", "to client", "round trip")
    ways = ", ".join(f"{name} {way.received}/{way.sent}" for name, way in zip(names, traffic.directions, strict=True))
    shares = ((share, traffic.rtt_at(share / 100)) for share in (50, 90, 99))
    rtts = ", ".join(f"p{share} {rtt * 1e3:.2f}" for share, rtt in shares if rtt is not None)
    return f"{ways}; RTT {rtts} ms" if rtts else ways
