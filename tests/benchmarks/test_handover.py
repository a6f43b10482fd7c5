"""Counts of the benchmark of handovers."""

import socket
from unittest.mock import Mock

from benchmarks.handover import Traffic
from benchmarks.measure import receive_buffer_drops


def test_lost_repeated_and_overtaken_packets_are_told_apart() -> None:
    # Two clients have four flows. Packet 8 is the third packet of the first flow.
    traffic = Traffic([Mock(), Mock()], Mock(), 1)
    traffic.counts["lost"] = 9
    for number in (0, 8, 4, 4, 1, 5, 5, 2, 7):
        traffic.count(number)
    assert (traffic.counts["lost"], traffic.counts["repeated"], traffic.counts["out of order"]) == (2, 2, 1)


def test_drops_of_a_receive_buffer_are_counted_by_host() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiving:
        receiving.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        receiving.bind(("127.83.9.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            for _ in range(50):
                sending.sendto(bytes(1000), receiving.getsockname())
        here, _ = receive_buffer_drops("127.83.9.1")
        _, elsewhere = receive_buffer_drops("127.83.9.2")
    assert 0 < here < 50
    assert elsewhere >= here
