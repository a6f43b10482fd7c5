import socket
import struct
import zlib

import click
import pytest

from benchmarks.command_line import chosen
from benchmarks.offload import frames
from benchmarks.offload.cases import SOCKET_WINDOW, WINDOW, all_cases
from benchmarks.offload.frames import Flow, Link, frame, frame_length, internet_checksum, payload
from benchmarks.offload.live import Counters
from benchmarks.offload.rows import sections
from benchmarks.offload.saturated import Floor, Spent, metrics_of, window_of
from benchmarks.offload.subjects import NATIVE
from benchmarks.servers import PLAIN

LINK = Link(b"\x02\0\0\0\0\1", "10.83.1.2", b"\x02\0\0\0\0\2", "10.83.1.11")


def test_checksum_is_that_of_the_rfcs_example() -> None:
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D


@pytest.mark.parametrize("size", [100, 101, 200, 1400])
@pytest.mark.parametrize("channel", [0, 0x4000])
def test_frame_has_checksums_that_a_receiver_takes(size: int, channel: int) -> None:
    built = frame(LINK, Flow(1234, 3478, channel), payload(size))
    assert len(built) == frame_length(size, channel=bool(channel))
    assert internet_checksum(built[14:34]) == 0
    datagram = built[34:]
    assert struct.unpack_from(">H", datagram, 4)[0] == len(datagram)
    pseudo_header = built[26:34] + struct.pack(">HH", socket.IPPROTO_UDP, len(datagram))
    assert internet_checksum(pseudo_header + datagram) == 0


def test_frame_has_channel_data_only_where_there_is_a_channel() -> None:
    data = payload(100)
    assert frame(LINK, Flow(1, 2, 0x4001), data)[42:] == b"\x40\x01\x00\x64" + data
    assert frame(LINK, Flow(1, 2, 0), data)[42:] == data


def test_flows_differ_in_nothing_but_what_the_sender_writes_for_each_packet() -> None:
    rests = {frame(LINK, Flow(port, 3478, 0x4000 + port), payload(200))[frames.HEADERS :] for port in range(100)}
    assert len(rests) == 1


def test_payload_has_its_size_and_no_two_parts_alike() -> None:
    data = payload(1400)
    parts = [data[at : at + 2] for at in range(0, 1400, 2)]
    assert len(data) == 1400
    assert len(set(parts)) == 700
    assert zlib.crc32(payload(101)) == zlib.crc32(payload(102)[:101])


def test_cpu_of_a_packet_is_what_neither_sending_nor_waiting_takes() -> None:
    packets = Counters(sent=1000, lost=0, waited=500, arrived=1000)
    spent = Spent(clock=1_000_000, load=500_000, process=100_000)
    metrics = metrics_of(packets, spent, Floor(packet=200, wait=100))
    assert metrics["cpu_ns"] == pytest.approx((500_000 - 200_000 - 50_000 + 100_000) / 1000)
    assert metrics["rate"] == pytest.approx(1e6)


def test_lost_packets_are_paid_by_those_that_arrive() -> None:
    packets = Counters(sent=1000, lost=500, waited=0, arrived=500)
    metrics = metrics_of(packets, Spent(clock=1_000_000, load=300_000, process=0), Floor(packet=100, wait=100))
    assert metrics["cpu_ns"] == pytest.approx(400)
    assert metrics["loss"] == pytest.approx(50)


def test_sockets_are_given_no_more_than_their_buffers_hold() -> None:
    (one,) = chosen(all_cases(), ["saturated-up-200-1"])
    (many,) = chosen(all_cases(), ["saturated-up-200-1000"])
    assert window_of(one, PLAIN) == SOCKET_WINDOW
    assert window_of(many, PLAIN) == 1000
    assert window_of(many, NATIVE) == WINDOW


def test_every_row_is_of_a_case_that_is_measured() -> None:
    cases = {case.name for case in all_cases()}
    assert {row.case for section in sections() for row in section.rows} == cases


def test_a_pattern_without_a_case_is_refused() -> None:
    with pytest.raises(click.ClickException, match="no case is called 'sideways'"):
        chosen(all_cases(), ["sideways"])
