"""Networks of machines around a relay: links, configuration, and captured packets."""

import contextlib
import ctypes
import fcntl
import ipaddress
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

import pytest

from relay.core.addresses import Family
from tests.support.machine import Machine, wait_until_up
from tests.support.offload.packets import checksum_of, sum_of
from tests.support.requirements import HAS_IPV6
from tests.support.udp import SO_RCVBUFFORCE

CLIENT: Final = {Family.IPV4: "10.77.1.2", Family.IPV6: "fd77:1::2"}
RELAY: Final = {Family.IPV4: "10.77.1.1", Family.IPV6: "fd77:1::1"}
BEHIND: Final = {Family.IPV4: "10.77.2.1", Family.IPV6: "fd77:2::1"}
"""Of the relay, on the side of the peers."""
PEER: Final = {Family.IPV4: "10.77.2.2", Family.IPV6: "fd77:2::2"}
ROUTE_MTU: Final = 1400
"""MTU of the routes to clients and peers: shorter than the links' MTU, so that senders can exceed the routes' MTU."""

_SIOCETHTOOL: Final = 0x8946
_SET_SUMS, _SET_GRO, _SET_FLAGS = 0x17, 0x2C, 0x26
_TAGS_BESIDE: Final = 1 << 7
"""ETH_FLAG_TXVLAN."""
_IPV6_FRAGMENT, _UDP = 44, 17
_OUTGOING: Final = 4
_EVERY_PROTOCOL: Final = 3


class Host(Machine):
    """A machine with the operations of these tests."""

    def ip(self, *lines: str) -> None:
        """Configure the machine, with lines in the format of `ip -batch`."""
        self.run("ip", "-batch", "-", text="\n".join(lines))

    def set_features(self, link: str, *, sums: bool, gro: bool = True) -> None:
        """Set the checksum offload and the polling of a link.

        Args:
            link: the link.
            sums: False makes the sender complete checksums, because virtual links do not.
            gro: True enables polling: otherwise packets from a driver with an XDP program are lost.
        """
        with self.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for command, value in ((_SET_SUMS, sums), (_SET_GRO, gro)):
                argument = ctypes.create_string_buffer(struct.pack("=II", command, value))
                fcntl.ioctl(asking, _SIOCETHTOOL, struct.pack("16sP16x", link.encode(), ctypes.addressof(argument)))

    def set_tags_in(self, link: str, *, inside: bool) -> None:
        """Set whether VLAN tags of sent packets are part of the packet, or are left to the hardware."""
        with self.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            argument = ctypes.create_string_buffer(struct.pack("=II", _SET_FLAGS, 0 if inside else _TAGS_BESIDE))
            fcntl.ioctl(asking, _SIOCETHTOOL, struct.pack("16sP16x", link.encode(), ctypes.addressof(argument)))

    def set_knob(self, name: str, value: int) -> None:
        """Set a sysctl below /proc/sys/net."""
        with self.entered():
            (Path("/proc/sys/net") / name).write_text(str(value))

    def open_socket(self, *arguments: int) -> socket.socket:
        """Open a socket there."""
        with self.entered():
            return socket.socket(*arguments)

    def udp(self, host: str, port: int = 0) -> socket.socket:
        """Open a bound UDP socket with a timeout."""
        opened = self.open_socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        opened.bind((host, port))
        opened.settimeout(30)
        return opened

    def links(self) -> str:
        """Return the output of `ip link`."""
        with self.entered():
            return subprocess.run(("ip", "link"), capture_output=True, text=True, timeout=60, check=True).stdout

    def ifindex(self, link: str) -> int:
        with self.entered():
            return socket.if_nametoindex(link)

    def mac(self, link: str) -> str:
        with self.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            answer = fcntl.ioctl(asking, 0x8927, struct.pack("40s", link.encode()))  # SIOCGIFHWADDR
        return answer[18:24].hex(":")


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Create machines, or skip the test if impossible."""
    if shutil.which("ip") is None:
        pytest.skip("NOTHING IS RELAYED IN THE KERNEL: ip is not installed (apt-get install iproute2)")
    with contextlib.ExitStack() as stack:
        made = []
        for _ in names:
            try:
                made.append(Host())
            except OSError as error:
                pytest.skip(f"NOTHING IS RELAYED IN THE KERNEL: networks take root ({error.strerror})")
            stack.callback(made[-1].close)
            made[-1].ip("link set lo up")
            if HAS_IPV6:
                # Duplicate address detection takes two seconds.
                made[-1].set_knob("ipv6/conf/default/accept_dad", 0)
        yield made


def connect(one: Host, link: str, other: Host, far: str, *, sums: bool = True) -> None:
    """Connect two machines, with or without completed checksums."""
    one.run("ip", "link", "add", link, "type", "veth", "peer", "name", far, "netns", other.path)
    for host, name in ((one, link), (other, far)):
        host.set_features(name, sums=not sums)


def configure(host: Host, link: str, *addresses: dict[Family, str] | str) -> None:
    """Add addresses to a link, with prefixes of 24 and 64 bits, and enable the link."""
    flat = [each for some in addresses for each in ([some] if isinstance(some, str) else some.values())]
    host.ip(
        *(f"addr add {each}/{64 if ':' in each else 24} dev {link}{' nodad' * (':' in each)}" for each in flat),
        f"link set {link} up",
    )


class Row(NamedTuple):
    """Three machines in a row. Links: c0 of the client and r0 of the relay, r1 of the relay and p0 of the peer."""

    client: Host
    relay: Host
    peer: Host

    def know_all(self) -> None:
        """Add permanent neighbours on the relay, so that no packet goes to its sockets for resolution."""
        there = ((CLIENT, "r0", self.client.mac("c0")), (PEER, "r1", self.peer.mac("p0")))
        self.relay.ip(*(f"neigh replace {at} dev {link} lladdr {mac}" for all_, link, mac in there for at in all_.values()))

    def shorten_routes(self) -> None:
        """Limit the relay's routes to `ROUTE_MTU`."""
        self.relay.ip(
            f"route replace 10.77.1.0/24 dev r0 src {RELAY[Family.IPV4]} mtu {ROUTE_MTU}",
            f"route replace 10.77.2.0/24 dev r1 src {BEHIND[Family.IPV4]} mtu {ROUTE_MTU}",
            f"route replace fd77:1::/64 dev r0 proto kernel metric 256 mtu {ROUTE_MTU}",
            f"route replace fd77:2::/64 dev r1 proto kernel metric 256 mtu {ROUTE_MTU}",
        )


@contextlib.contextmanager
def row(*, sums: bool = True) -> Iterator[Row]:
    """Return a client, a relay and a peer, with the relay reachable for both."""
    with hosts(*Row._fields) as made:
        network = Row(*made)
        connect(network.relay, "r0", network.client, "c0", sums=sums)
        connect(network.relay, "r1", network.peer, "p0", sums=sums)
        configure(network.relay, "r0", RELAY)
        configure(network.relay, "r1", BEHIND)
        configure(network.client, "c0", CLIENT)
        configure(network.peer, "p0", PEER)
        network.client.ip(*(f"route add default via {each}" for each in RELAY.values()))
        network.peer.ip(*(f"route add default via {each}" for each in BEHIND.values()))
        wait_until_up(*network)
        yield network


class Seen(NamedTuple):
    """A captured packet."""

    to: str
    """MAC addresses."""
    source: str
    ip: bytes
    """Return the packet from the IP header on, without padding."""

    @property
    def is_udp(self) -> bool:
        """Return whether the packet is UDP, or a fragment."""
        if self.ip[0] >> 4 == 4:
            return self.ip[9] == _UDP
        return self.ip[6] in (_UDP, _IPV6_FRAGMENT)

    @property
    def is_whole(self) -> bool:
        return not self._fragment if self.ip[0] >> 4 == 4 else self.ip[6] == _UDP

    @property
    def _fragment(self) -> int:
        return int.from_bytes(self.ip[6:8], "big") & 0x3FFF

    @property
    def udp(self) -> bytes:
        return self.ip[20:] if self.ip[0] >> 4 == 4 else self.ip[40:]

    @property
    def payload(self) -> bytes:
        return self.udp[8:]

    def check_sums(self) -> None:
        """Check that each checksum is present and correct."""
        assert self.is_whole
        addresses = self.ip[12:20] if self.ip[0] >> 4 == 4 else self.ip[8:40]
        if self.ip[0] >> 4 == 4:
            assert sum_of(self.ip[:20]) == 0, f"IPv4 checksum: {self.ip.hex(' ', 4)}"
        udp = self.udp
        assert len(udp) == int.from_bytes(udp[4:6], "big")
        front = addresses + struct.pack(">HH", _UDP, len(udp))
        right = checksum_of(front, udp[:6], udp[8:])
        assert int.from_bytes(udp[6:8], "big") == right, f"UDP checksum, {right:#06x}: {self.ip.hex(' ', 4)}"

    def compared(self) -> bytes:
        """Return the fields relevant to the receiver: without hop limit, flow label and fragment ID."""
        ip = bytearray(self.ip)
        if ip[0] >> 4 == 4:
            ip[4:6] = ip[10:12] = bytes(2)
            ip[8] = 0
        else:
            ip[1] &= 0xF0
            ip[2:4] = bytes(2)
            ip[7] = 0
            if ip[6] == _IPV6_FRAGMENT:
                ip[44:48] = bytes(4)
        return bytes(ip)


class Capture:
    """Packets that arrive by a link from now on."""

    def __init__(self, host: Host, link: str) -> None:
        self._socket = host.open_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        self._socket.bind((link, _EVERY_PROTOCOL))
        self._socket.settimeout(0)
        self.take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def frames(self) -> list[bytes]:
        """Return the frames since the previous call, without waiting."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, _, kind, *_) = self._socket.recvfrom(65536)
                if kind != _OUTGOING:
                    found.append(data)
        return found

    def take(self, wanted: Callable[[Seen], bool] = lambda _: True) -> list[Seen]:
        """Return the UDP packets since the previous call, without waiting."""
        seen = (_dissected(each) for each in self.frames())
        return [each for each in seen if each is not None and each.is_udp and wanted(each)]


def _dissected(frame: bytes) -> Seen | None:
    kind, ip = frame[12:14], frame[14:]
    if kind == b"\x08\x00":
        length = int.from_bytes(ip[2:4], "big")
    elif kind == b"\x86\xdd":
        length = 40 + int.from_bytes(ip[4:6], "big")
    else:
        return None
    return Seen(frame[:6].hex(":"), frame[6:12].hex(":"), ip[:length])


def asks_for(frame: bytes, host: str) -> bool:
    """Return whether a frame is an ARP request or neighbour solicitation for a host."""
    packed = ipaddress.ip_address(host).packed
    if frame[12:14] == b"\x08\x06":
        return frame[20:22] == b"\0\1" and frame[38:42] == packed
    # An IPv6 header, then ICMPv6 of type 135.
    return frame[12:14] == b"\x86\xdd" and frame[20] == 58 and frame[54] == 135 and frame[62:78] == packed
