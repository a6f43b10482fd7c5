"""The addresses that operators ask, of a real program, while others ask for trouble."""

import contextlib
import itertools
import json
import re
import socket
import threading
import urllib.request

import psutil

from relay import __version__
from tests.interop.conftest import ProgramStarter
from tests.turn_client import TurnClient, udp_socket

GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


def trouble(address: tuple[str, int], stop: threading.Event) -> None:
    """Connect to an HTTP address all the time: with a request, with nonsense, with nothing at all."""
    held: list[socket.socket] = []
    for said in itertools.cycle((GET, b"GET / HTTP/1.1\r\nX: ", b"\0\xff" * 5000, b"")):
        if stop.is_set():
            break
        with contextlib.suppress(OSError):
            held.append(socket.create_connection(address, timeout=5))
            held[-1].sendall(said)
        if len(held) > 100:
            held.pop(0).close()
    for each in held:
        each.close()


def test_it_relays_and_is_well_while_its_http_addresses_are_under_attack(start_program: ProgramStarter) -> None:
    program = start_program("--allow-peer", "127.0.0.0/8")
    found = re.search(r"control=(\S+):(\d+)", program.log)
    assert found is not None
    addresses = [(program.host, 8080), (found[1], int(found[2]))]
    stop = threading.Event()
    troublemakers = [threading.Thread(target=trouble, args=(address, stop)) for address in addresses * 2]
    for each in troublemakers:
        each.start()
    try:
        with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client, udp_socket("127.0.0.1") as peer:
            client.allocate()
            client.bind_channel(0x4000, peer.getsockname())
            for number in range(1000):
                client.send(0x4000, b"%d" % number)
                data, relayed = peer.recvfrom(100)
                peer.sendto(data, relayed)
                assert client.receive() == (0x4000, b"%d" % number)
        assert psutil.Process(program.process.pid).num_threads() < 120
    finally:
        stop.set()
        for each in troublemakers:
            each.join()
    for host, port in addresses:
        with urllib.request.urlopen(f"http://{host}:{port}/healthz", timeout=30) as answer:
            assert json.load(answer) == {"status": "ok", "version": __version__}
    assert program.stop() == 0
    assert "Traceback" not in program.log


def test_a_control_address_that_others_reach_is_warned_of(start_program: ProgramStarter) -> None:
    program = start_program("--control-address", "0.0.0.0:0")
    assert "the control address is not loopback" in program.log
    assert "not loopback" not in start_program().log
