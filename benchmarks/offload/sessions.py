"""A server in the middle namespace, with its flows and their packets as frames."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from benchmarks.cases import GENERIC, NATIVE
from benchmarks.measure import MeasurementError
from benchmarks.offload import frames
from benchmarks.offload.network import CLIENT_HOST, FAR_END, PEER_HOST, RELAY_ENDS, Network
from benchmarks.servers import Server
from benchmarks.sessions import Session

MODES: Final = {NATIVE: "driver", GENERIC: "generic"}


class Way:
    """The path of packets in one direction."""

    def __init__(self, network: Network, direction: str) -> None:
        self.network = network
        self.up = direction == "up"
        places = (network.client, network.peer)
        self.source, self.sink = places if self.up else places[::-1]
        self.relay_end = RELAY_ENDS[not self.up]
        """The interface at which the relay receives."""
        self.growth = -4 if self.up else 4
        """Bytes by which relaying changes the length of a frame: the header of ChannelData."""
        self.source_interface = self.source.interface(FAR_END)
        self.relay_interface = network.relay.interface(self.relay_end)


class OffloadSession(Session):
    """A running server with its flows."""

    def __init__(self, server: Server, network: Network, cpus: Iterable[int]) -> None:
        super().__init__(server, cpus, network.client.entered, network.relay.entered, network.peer.entered)
        self._is_offloaded = server.name in MODES
        if self._is_offloaded:
            try:
                self._control("POST", "/detach")
            except MeasurementError:
                self.close()
                raise

    @contextlib.contextmanager
    def relaying(self, direction: str) -> Iterator[None]:
        """Attach the XDP program meanwhile, if the server is a relay with offload."""
        if not self._is_offloaded:
            yield
            return
        attached = self._control("POST", "/attach").get("xdp_attached")
        if not attached or not all(mode == MODES[self.server.name] for mode in attached.values()):
            raise MeasurementError(f"{self.server.name} is attached as {attached}")
        try:
            before = self._packets(direction)
            yield
            if self._packets(direction) == before:
                raise MeasurementError("the XDP program relayed no packet; sockets relayed all")
        finally:
            self._control("POST", "/detach")

    def frames(self, way: Way, count: int, data: bytes) -> list[bytes]:
        """Return the first packet of some flows."""
        macs = way.source_interface.mac, way.relay_interface.mac
        made = []
        for flow in self.flows(count):
            if way.up:
                host, port = self.server.address
                hop = frames.Hop(macs[0], CLIENT_HOST, macs[1], host)
                ports = frames.Ports(flow.client.getsockname()[1], port, flow.channel)
            else:
                hop = frames.Hop(macs[0], PEER_HOST, macs[1], flow.relayed[0])
                ports = frames.Ports(self.server.endpoints.peer[1], flow.relayed[1], 0)
            made.append(frames.frame(hop, ports, data))
        return made

    def _packets(self, direction: str) -> int:
        """Return the packets relayed by the XDP program."""
        return int(self._control("GET")["xdp_packets"][{"up": "to_peer", "down": "to_client"}[direction]])

    def _control(self, method: str, path: str = "") -> dict[str, Any]:
        """Send a request to the control address of the relay, on the loopback interface of its namespace."""
        with self.server_room():
            document: dict[str, Any] = json.loads(self.server.control(f"/offload{path}", method))
            return document
