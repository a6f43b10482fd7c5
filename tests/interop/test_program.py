"""The program as a whole: started, looked at, and ended the ways an operator does."""

import contextlib
import ctypes
import json
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

from relay import __version__
from relay.actors.departure import STOP_TIMEOUT
from relay.core.credentials import RelaySecret, mint
from tests.conftest import HAS_IPV6, needs_ipv6
from tests.interop.conftest import Program, ProgramStarter
from tests.log_lines import valid
from tests.turn_client import TurnClient, udp_socket

HOST = "127.82.0.1"
ALLOCATIONS = 250
"""It has a second and a half to close them all; a thousand take a fifth of that, where nothing else is to be done."""


def get(url: str) -> tuple[int, dict[str, str]]:
    """Give the status and the body of a page."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - an address of this machine
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def drop_sys_resource() -> None:
    """Take from a process about to run what lets root raise its limits. Where it can't be taken it isn't there."""
    pr_capbset_drop, cap_sys_resource = 24, 24
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_sys_resource, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))


def refusal(*options: str, limited: bool = False) -> str:
    """Start the program where it can't run, and give the line with which it says so."""
    done = subprocess.run(
        [sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", HOST, *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=drop_sys_resource if limited else None,
    )
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_the_port_for_clients_in_use_is_said_with_who_has_it() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((HOST, 3478))
        line = refusal("--max-allocations", "10")
    assert re.search(rf"{re.escape(HOST)}:3478/udp is in use by \S+ \(pid \d+\)", line)


@pytest.mark.parametrize("name", ["health", "control"])
def test_another_port_in_use_is_said_with_its_option_and_who_has_it(name: str) -> None:
    with socket.create_server((HOST, 0)) as other:
        at = f"{HOST}:{other.getsockname()[1]}"
        line = refusal("--health-address", f"{HOST}:0", "--max-allocations", "10", f"--{name}-address", at)
    assert re.search(rf"{re.escape(at)}/tcp is in use by \S+ \(pid \d+\)", line)
    assert f"--{name}-address" in line


def test_an_address_that_the_machine_does_not_have_is_said() -> None:
    assert "does not have the address 192.0.2.1" in refusal("--max-allocations", "10", "--bind-ip4-addr", "192.0.2.1")
    assert "an address of this machine" in refusal("--max-allocations", "10", "--health-address", "192.0.2.1:80")


def test_bad_use_is_the_only_line_though_there_is_more_to_be_said_at_a_start() -> None:
    unusual = ("--rng-seed", "1", "--max-allocations", "16384", "--log-filter", "debug")
    assert "192.0.2.1" in refusal(*unusual, "--health-address", "192.0.2.1:80")


def test_a_descriptor_limit_that_can_not_be_raised_is_said_with_the_number_that_fits() -> None:
    line = refusal(limited=True)
    assert "16384 allocations need" in line
    assert "this process may have 1000" in line
    fits = re.search(r"--max-allocations (\d+) fits", line)
    assert fits is not None
    refused = refusal("--max-allocations", fits[1], "--health-address", "192.0.2.1:80", limited=True)
    assert "192.0.2.1" in refused, "what is said to fit is taken, and the next thing complained of"


def test_health_pages_tell_that_it_lives_and_answers(program: Program) -> None:
    assert get(f"http://{program.host}:8080/healthz") == (200, {"status": "ok", "version": __version__})
    assert get(f"http://{program.host}:8080/readyz") == (200, {"status": "ready", "version": __version__})
    assert get(f"http://{program.host}:8080/other")[0] == 404


def test_a_slow_client_of_the_health_address_keeps_nobody_waiting(program: Program) -> None:
    with socket.create_connection((program.host, 8080), timeout=30) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert get(f"http://{program.host}:8080/healthz")[0] == 200
        slow.sendall(b"x" * 10_000 + b"\r\n\r\n")
        assert slow.recv(100).split()[1] == b"431"


def test_the_credential_it_prints_is_printed_to_standard_output_only_and_works(program: Program) -> None:
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate()
    assert f"turn:{program.host}:3478?transport=udp" in program.introduction
    assert program.credential.password not in program.log
    expiry = int(program.credential.username.partition(":")[0])
    assert abs(expiry - time.time() - 86400) < 60


def test_with_a_secret_file_it_prints_nothing_and_takes_what_the_secret_mints(
    start_program: ProgramStarter, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    path.write_text(" from a file \n")
    program = start_program("--relay-secret-file", str(path))
    credential = mint(RelaySecret("from a file"), 1 << 33, "salt")
    with TurnClient((program.host, 3478), credential, "127.0.0.1") as client:
        client.allocate()
    assert program.stop() == 0
    assert program.process.stdout is not None
    assert program.process.stdout.read() == ""


def test_the_same_seed_makes_the_same_secret(start_program: ProgramStarter) -> None:
    passwords = set()
    for _ in range(2):
        program = start_program("--rng-seed", "7")
        expiry, _, salt = program.credential.username.partition(":")
        passwords.add(program.credential.password == mint(seeded_secret(7), int(expiry), salt).password)
    assert passwords == {True}
    assert "for tests only" in program.log


def seeded_secret(seed: int) -> RelaySecret:
    return RelaySecret(random.Random(seed).randbytes(32).hex())


def test_the_log_in_json_is_one_object_a_line(start_program: ProgramStarter) -> None:
    program = start_program("--log-format", "json")
    assert program.stop() == 0
    events = [valid(line) for line in program.log.splitlines()]
    assert "ready" in [event["event"] for event in events]


@pytest.mark.parametrize("log_format", ["json", "human"])
def test_a_username_with_escape_codes_and_lines_of_its_own_is_nowhere_in_the_log(
    start_program: ProgramStarter, tmp_path: Path, log_format: str
) -> None:
    path = tmp_path / "secret"
    path.write_text("secret")
    program = start_program("--relay-secret-file", str(path), "--log-format", log_format, "--log-filter", "trace")
    credential = mint(RelaySecret("secret"), 1 << 33, 'evil\n"}\nFATAL forged\n\x1b[31m\u202e')
    with TurnClient((program.host, 3478), credential, "127.0.0.1") as client:
        client.allocate()
        assert client.bind_channel(0x4000, ("127.0.0.1", 9)) == 403
        assert client.refresh(0) is None
    assert program.stop() == 0
    assert "allocation freed" in program.log
    assert "peer refused" in program.log
    assert str(1 << 33) not in program.log
    for foreign in ("evil", "forged", "\x1b", "\u202e"):
        assert foreign not in program.log
    if log_format == "json":
        assert {valid(line)["level"] for line in program.log.splitlines()} <= {"debug", "info", "warning"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_0_in_time_with_hundreds_of_allocations(
    start_program: ProgramStarter, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "secret"
    path.write_text("secret")
    program = start_program("--relay-secret-file", str(path))
    clients = [
        TurnClient((program.host, 3478), mint(RelaySecret("secret"), 1 << 33, str(salt)), "127.0.0.1")
        for salt in range(ALLOCATIONS)
    ]
    try:
        relayed = {client.allocate()[0] for client in clients}
    finally:
        for client in clients:
            client.socket.close()
    assert len(relayed) == ALLOCATIONS
    began = time.monotonic()
    assert program.stop(number) == 0
    assert time.monotonic() - began < STOP_TIMEOUT
    assert "Traceback" not in program.log
    assert "in time" not in program.log


def test_it_stops_in_time_while_hundreds_of_allocations_are_busy(start_program: ProgramStarter, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("secret")
    program = start_program("--relay-secret-file", str(path), "--allow-peer", "127.0.0.0/8")
    with udp_socket("127.0.0.1") as peer, contextlib.ExitStack() as stack:
        relayed = []
        for salt in range(ALLOCATIONS):
            credential = mint(RelaySecret("secret"), 1 << 33, str(salt))
            client = stack.enter_context(TurnClient((program.host, 3478), credential, "127.0.0.1"))
            relayed += client.allocate()
            assert client.bind_channel(0x4000, peer.getsockname()) is None
        ended = threading.Event()

        def flood() -> None:
            while not ended.is_set():
                for address in relayed:
                    peer.sendto(bytes(172), (address[0], address[1]))
                # About 20,000 packets a second, which is about all that one core relays.
                ended.wait(0.0125)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            # The last client gets packets: so all allocations have their share by now.
            assert client.receive() == (0x4000, bytes(172))
            began = time.monotonic()
            assert program.stop() == 0
            assert time.monotonic() - began < STOP_TIMEOUT
        finally:
            ended.set()
            flooding.join()
    assert "in time" not in program.log


def test_a_log_that_nobody_reads_holds_nothing_up(start_program: ProgramStarter) -> None:
    program = start_program("--allow-peer", "127.0.0.0/8", reads_log=False)
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client, udp_socket("127.0.0.1") as peer:
        client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        for _ in range(30):
            # Far more than a pipe takes.
            program.process.send_signal(signal.SIGUSR1)
            client.send(0x4000, b"still relayed")
            assert peer.recv(100) == b"still relayed"
    assert program.stop() == 0


def test_a_log_that_can_not_be_written_ends_nothing(start_program: ProgramStarter) -> None:
    program = start_program(reads_log=False)
    assert program.process.stderr is not None
    program.process.stderr.close()
    program.process.send_signal(signal.SIGUSR1)
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate()
    assert program.stop() == 0


def test_it_runs_with_standard_error_closed() -> None:
    command = [sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", HOST, "--max-allocations", "10"]
    command += ["--health-address", f"{HOST}:0", "--control-address", f"{HOST}:0"]
    shell = f"exec {shlex.join(command)} 2>&-"
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert "This credential is valid" in process.stdout.readline()
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_a_credential_that_can_not_be_printed_is_bad_use() -> None:
    command = [sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", HOST, "--max-allocations", "10"]
    command += ["--health-address", f"{HOST}:0", "--control-address", f"{HOST}:0"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "can't print the credential" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_sigusr1_shows_every_thread_by_name_and_the_state_while_packets_flow(program: Program) -> None:
    payload = b"PAYLOAD-OF-A-PACKET"
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client, udp_socket("127.0.0.1") as peer:
        (relayed,) = client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        for number in range(2000):
            client.send(0x4000, payload)
            if number == 1000:
                program.process.send_signal(signal.SIGUSR1)
            assert peer.recv(100) == payload
        program.wait_for_log("--- end of dump")
    said = program.log
    for thread in ("MainThread", "server", "listener-ipv4-1", f"allocation-1-port-{relayed[1]}"):
        assert f"thread {thread}:" in said
    assert re.search(r"^uptime_seconds: \d", said, re.MULTILINE)
    for line in ("allocations: 1", "live_channels: 1", "successes: allocate=1, channel_bind=1"):
        assert line in said
    for inbox in ("server_inbox", "to_peer_packets", "dropped_late"):
        assert re.search(rf"^{inbox}: \d+$", said, re.MULTILINE)
    for secret in (program.credential.password, program.credential.username, payload.decode()):
        assert secret not in said
    assert program.stop() == 0


def test_sigquit_shows_all_stacks_and_ends_nothing_however_often_and_whatever_else_is_done(program: Program) -> None:
    """To read the stack of a thread that runs takes the interpreter: without it, one in a thousand dumps ended the relay."""
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate()
        for number in range(1, 31):
            program.process.send_signal(signal.SIGQUIT)
            while program.log.count("--- end of stacks") < number:
                assert client.refresh(600) is None
    for thread in ("MainThread", "server", "signals"):
        assert f"thread {thread}:" in program.log
    assert program.credential.password not in program.log
    assert get(f"http://{program.host}:8080/readyz")[0] == 200
    assert program.stop() == 0


def test_sigabrt_ends_it_with_all_stacks_as_last_words(program: Program) -> None:
    """That is what systemd sends to a relay that hangs, and a signal handler in C writes them."""
    assert program.stop(signal.SIGABRT) == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in program.log
    assert "relay/net/receiver.py" in program.log
    assert program.credential.password not in program.log


@needs_ipv6
def test_it_serves_ipv6_alone(start_program: ProgramStarter) -> None:
    program = start_program(hosts=("::1",))
    with TurnClient(("::1", 3478), program.credential) as client:
        (relayed,) = client.allocate(family=2)
        assert relayed[0] == "::1"


def test_its_own_ports_are_no_peers_however_they_are_spelt(start_program: ProgramStarter) -> None:
    program = start_program("--allow-peer", "127.0.0.0/8,::/0", "--public-ip6-addr", "::1") if HAS_IPV6 else start_program()
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate(dual=HAS_IPV6)
        for port in (3478, 8080):
            assert client.bind_channel(0x4000, (program.host, port)) == 403
            if HAS_IPV6:
                assert client.bind_channel(0x4000, ("::1", port, 0, 0)) == 403
                assert client.bind_channel(0x4000, (f"::ffff:{program.host}", port, 0, 0)) == 403


def test_probe_finds_nothing_wrong_with_it(program: Program) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "relay", "probe", program.host),
            *("--username", program.credential.username, "--password", program.credential.password, "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done
    assert json.loads(done.stdout)


def test_a_wheel_built_from_the_tree_runs_elsewhere(tmp_path: Path) -> None:
    tree = Path(__file__).parents[2]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(tmp_path)]
    pip += ["--no-deps", "--no-index", "--no-build-isolation"]
    source = tmp_path / "source"
    # A build leaves files in the tree that it is given.
    shutil.copytree(tree / "relay", source / "relay")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(tree / name, source)
    subprocess.run([*pip, str(source)], check=True, timeout=110)
    (wheel,) = tmp_path.glob("firezone_relay-*.whl")
    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(elsewhere)
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import relay.cli; print(relay.__file__); relay.cli.main()", "--version"],
        env={"PYTHONPATH": str(elsewhere)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [str(elsewhere / "relay" / "__init__.py"), __version__]
