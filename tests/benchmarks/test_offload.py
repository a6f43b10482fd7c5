import socket
import struct

import pytest

from benchmarks.cases import NATIVE, OFFLOAD_WINDOW, chosen
from benchmarks.offload import frames
from benchmarks.offload.frames import Hop, Ports, frame, internet_checksum
from benchmarks.offload.live import Counters
from benchmarks.offload.saturated import Floor, Spent, metrics_of
from benchmarks.servers import PLAIN

LINK = Hop(b"\x02\0\0\0\0\1", "10.83.1.2", b"\x02\0\0\0\0\2", "10.83.1.11")


def test_checksum_matches_the_example_of_rfc_1071() -> None:
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D


@pytest.mark.parametrize("size", [100, 101, 200, 1400])
@pytest.mark.parametrize("channel", [0, 0x4000])
def test_frame_has_valid_checksums(size: int, channel: int) -> None:
    built = frame(LINK, Ports(1234, 3478, channel), bytes(range(100)) + bytes(size - 100))
    assert len(built) == 14 + 20 + 8 + 4 * bool(channel) + size
    assert internet_checksum(built[14:34]) == 0
    datagram = built[34:]
    assert struct.unpack_from(">H", datagram, 4)[0] == len(datagram)
    pseudo_header = built[26:34] + struct.pack(">HH", socket.IPPROTO_UDP, len(datagram))
    assert internet_checksum(pseudo_header + datagram) == 0


def test_frame_has_channel_data_only_with_a_channel() -> None:
    data = bytes(range(100))
    assert frame(LINK, Ports(1, 2, 0x4001), data)[42:] == b"\x40\x01\x00\x64" + data
    assert frame(LINK, Ports(1, 2, 0), data)[42:] == data


def test_flows_differ_only_in_the_headers_written_by_the_sender() -> None:
    rests = {frame(LINK, Ports(port, 3478, 0x4000 + port), bytes(200))[frames.HEADERS :] for port in range(100)}
    assert len(rests) == 1


def test_cpu_of_a_packet_excludes_sending_and_waiting() -> None:
    packets = Counters(sent=1000, lost=0, waited=500, arrived=1000)
    spent = Spent(clock=1_000_000, load=500_000, process=100_000)
    metrics = metrics_of(packets, spent, Floor(packet=200, wait=100))
    assert metrics["cpu_ns"] == pytest.approx((500_000 - 200_000 - 50_000 + 100_000) / 1000)
    assert metrics["rate"] == pytest.approx(1e6)


def test_cpu_of_lost_packets_is_divided_among_received_packets() -> None:
    packets = Counters(sent=1000, lost=500, waited=0, arrived=500)
    metrics = metrics_of(packets, Spent(clock=1_000_000, load=300_000, process=0), Floor(packet=100, wait=100))
    assert metrics["cpu_ns"] == pytest.approx(400)
    assert metrics["loss"] == pytest.approx(50)


def test_sockets_get_no_more_packets_than_fit_their_buffers() -> None:
    one, many = chosen(["offload-up-200-"])
    assert one.offload_window(PLAIN) == 40
    assert many.offload_window(PLAIN) == 1000
    assert many.offload_window(NATIVE) == OFFLOAD_WINDOW
