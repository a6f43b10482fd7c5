"""The HTTP addresses of the program, under attack."""

import contextlib
import http.client
import itertools
import json
import re
import socket
import threading
import urllib.request

import psutil

from relay import __version__
from tests.support.program import ProgramStarter
from tests.support.turn_client import TurnClient, udp_socket

GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


def trouble(address: tuple[str, int], stop: threading.Event) -> None:
    """Connect to an HTTP address in a loop, with requests, with garbage and without data."""
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


def test_packets_are_relayed_during_attacks_on_http_addresses(start_program: ProgramStarter) -> None:
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


def test_the_metrics_address_has_metrics_and_nothing_else(start_program: ProgramStarter) -> None:
    program = start_program("--metrics-addr", "127.0.0.1:0")
    found = re.search(r"\bmetrics=(\S+):(\d+)", program.log)
    assert found is not None

    def ask(method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    assert (ask("GET", "/metrics")[0], ask("HEAD", "/metrics")) == (200, (200, b""))
    assert b"relay_ready 1.0" in ask("GET", "/metrics")[1]
    for path in ("/", "/livez", "/readyz", "/healthz", "/status", "/drain", "/log_filter", "/offload", "/metrics/"):
        assert (ask("GET", path)[0], ask("POST", path)[0]) == (404, 404)
    for method in ("POST", "PUT", "DELETE"):
        assert ask(method, "/metrics")[0] == 405


def test_a_public_control_address_is_logged_as_a_warning(start_program: ProgramStarter) -> None:
    program = start_program("--control-endpoint", "0.0.0.0:0")
    assert "the control address is not loopback" in program.log
    assert "not loopback" not in start_program().log
