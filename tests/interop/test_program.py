"""The whole program: start, inspect and stop it like an operator."""

import contextlib
import ctypes
import json
import platform
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
from relay.core.credentials import RelaySecret, mint
from relay.system.shutdown import STOP_TIMEOUT
from tests.support.log_lines import valid
from tests.support.process import COMMAND, run
from tests.support.program import Program, ProgramStarter
from tests.support.requirements import HAS_IPV6, needs_ipv6
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import wait_until

HOST = "127.82.0.1"
ARGUMENTS = (
    *("--standalone", "--public-ip4-addr", HOST, "--max-allocations", "10"),
    *("--health-check-addr", f"{HOST}:0", "--control-endpoint", f"{HOST}:0"),
)
ALLOCATIONS = 250
"""The server actor has 1.5 s to close all allocations. 1,000 allocations take 0.3 s on an idle machine."""


def get(url: str) -> tuple[int, dict[str, str]]:
    """Return the status and the body of a page."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - an address of this machine
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def drop_sys_resource() -> None:
    """Drop the capability to raise limits from a process before exec. The call fails only without the capability."""
    pr_capbset_drop, cap_sys_resource = 24, 24
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_sys_resource, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))


def usage_error(*options: str, limited: bool = False) -> str:
    """Start the program with invalid options, and return the error line."""
    arguments = ("--standalone", "--public-ip4-addr", HOST, *options)
    if limited:
        # The program inherits a limit, and may not raise the limit.
        done = subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            preexec_fn=drop_sys_resource,
        )
    else:
        done = run(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_the_error_for_a_clients_port_in_use_names_the_process() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((HOST, 3478))
        line = usage_error("--max-allocations", "10")
    assert re.search(rf"{re.escape(HOST)}:3478/udp is in use by \S+ \(pid \d+\)", line)


@pytest.mark.parametrize("option", ["--health-check-addr", "--control-endpoint"])
def test_the_error_for_another_port_in_use_names_option_and_process(option: str) -> None:
    with socket.create_server((HOST, 0)) as other:
        at = f"{HOST}:{other.getsockname()[1]}"
        line = usage_error("--health-check-addr", f"{HOST}:0", "--max-allocations", "10", option, at)
    assert re.search(rf"{re.escape(at)}/tcp is in use by \S+ \(pid \d+\)", line)
    assert option in line


def test_an_address_of_another_machine_is_a_usage_error() -> None:
    assert "does not have the address 192.0.2.1" in usage_error("--max-allocations", "10", "--bind-ip4-addr", "192.0.2.1")
    assert "an address of this machine" in usage_error("--max-allocations", "10", "--health-check-addr", "192.0.2.1:80")


def test_a_usage_error_is_the_only_line_even_with_warnings_at_start() -> None:
    unusual = ("--rng-seed", "1", "--max-allocations", "16384", "--log-filter", "debug")
    assert "192.0.2.1" in usage_error(*unusual, "--health-check-addr", "192.0.2.1:80")


def test_the_error_for_a_low_descriptor_limit_suggests_a_number_that_fits() -> None:
    line = usage_error(limited=True)
    assert "16384 allocations need" in line
    assert "this process may have 1000" in line
    fits = re.search(r"--max-allocations (\d+) fits", line)
    assert fits is not None
    refused = usage_error("--max-allocations", fits[1], "--health-check-addr", "192.0.2.1:80", limited=True)
    assert "192.0.2.1" in refused, "the suggested number is accepted, and the next error is reported"


def test_health_pages_report_alive_and_ready(program: Program) -> None:
    assert get(f"http://{program.host}:8080/healthz") == (200, {"status": "ok", "version": __version__})
    assert get(f"http://{program.host}:8080/readyz") == (200, {"status": "ready", "version": __version__})
    assert get(f"http://{program.host}:8080/other")[0] == 404


def test_a_slow_http_client_does_not_delay_other_clients(program: Program) -> None:
    with socket.create_connection((program.host, 8080), timeout=30) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert get(f"http://{program.host}:8080/healthz")[0] == 200
        slow.sendall(b"x" * 10_000 + b"\r\n\r\n")
        # 408 if the machine is so busy that the request takes 5 s.
        assert slow.recv(100).split()[1] in {b"431", b"408"}


def test_the_printed_credential_works_and_is_not_in_the_log(program: Program) -> None:
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate()
    assert f"turn:{program.host}:3478?transport=udp" in program.introduction
    assert program.credential.password not in program.log
    expiry = int(program.credential.username.partition(":")[0])
    assert abs(expiry - time.time() - 86400) < 60


def test_a_secret_file_prints_nothing_and_accepts_its_credentials(start_program: ProgramStarter, tmp_path: Path) -> None:
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


def test_the_json_log_has_one_object_per_line(start_program: ProgramStarter) -> None:
    program = start_program("--log-format", "json")
    assert program.stop() == 0
    events = [valid(line) for line in program.log.splitlines()]
    assert "ready" in [event["event"] for event in events]


@pytest.mark.parametrize("log_format", ["json", "human"])
def test_a_username_with_escape_codes_and_line_breaks_is_not_in_the_log(
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
def test_a_signal_stops_hundreds_of_allocations_in_time_with_exit_code_0(
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


def test_the_relay_stops_in_time_with_hundreds_of_busy_allocations(start_program: ProgramStarter, tmp_path: Path) -> None:
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
                # About 20,000 packets per second, close to the maximum of one CPU.
                ended.wait(0.0125)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            # The last client receives packets, so all allocations are busy by now.
            assert client.receive() == (0x4000, bytes(172))
            began = time.monotonic()
            assert program.stop() == 0
            assert time.monotonic() - began < STOP_TIMEOUT
        finally:
            ended.set()
            flooding.join()
    assert "in time" not in program.log


def test_a_log_without_reader_does_not_block_the_relay(start_program: ProgramStarter) -> None:
    program = start_program("--allow-peer", "127.0.0.0/8", reads_log=False)
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client, udp_socket("127.0.0.1") as peer:
        client.allocate()
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        for _ in range(30):
            # Far more than the buffer of a pipe.
            program.process.send_signal(signal.SIGUSR1)
            client.send(0x4000, b"still relayed")
            assert peer.recv(100) == b"still relayed"
    assert program.stop() == 0


def test_a_closed_log_does_not_stop_the_relay(start_program: ProgramStarter) -> None:
    program = start_program(reads_log=False)
    assert program.process.stderr is not None
    program.process.stderr.close()
    program.process.send_signal(signal.SIGUSR1)
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate()
    assert program.stop() == 0


def test_the_relay_runs_with_standard_error_closed() -> None:
    # The interpreter opens its streams as it starts.
    shell = f"exec {shlex.join((*COMMAND, *ARGUMENTS))} 2>&-"
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert "This credential is valid" in process.stdout.readline()
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_a_failure_to_print_the_credential_is_a_usage_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = run(*ARGUMENTS, stdout=full.fileno())
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
        program.wait_for_log("end of dump")
    said = program.log
    for thread in ("MainThread", "server", "listener-ipv4-1", f"allocation-1-port-{relayed[1]}"):
        assert re.search(rf" names=(\S+,)?{thread}(,\S+)?$", said, re.MULTILINE), thread
    for line in ("relay.active_allocations=1", "relay.channels=1"):
        assert f"    | {line}\n" in said
    assert re.search(r"relay\.responses=.*success/allocate:1,.*success/channelbind:1", said)
    for name in ("process.memory.usage", "relay.inbox.depth"):
        assert re.search(rf"^    \| {name}=\d+$", said, re.MULTILINE)
    assert re.search(r" state +inboxes=.*ServerActor:\d", said)
    assert f"relay.info={__version__}/{platform.python_version()}/" in said
    for secret in (program.credential.password, program.credential.username, payload.decode()):
        assert secret not in said
    assert program.stop() == 0


def test_repeated_sigquit_under_load_shows_all_stacks_and_stops_nothing(program: Program) -> None:
    """The dump must hold the interpreter lock. Without the lock, one in a thousand dumps crashed the relay."""
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate()
        for number in range(1, 31):
            program.process.send_signal(signal.SIGQUIT)
            while program.log.count(" end of dump ") < number:
                assert client.refresh(600) is None
    for thread in ("MainThread", "server", "signals"):
        assert re.search(rf" names=(\S+,)?{thread}(,\S+)?$", program.log, re.MULTILINE), thread
    assert program.credential.password not in program.log
    assert get(f"http://{program.host}:8080/readyz")[0] == 200
    assert program.stop() == 0


def test_sigabrt_writes_the_stacks_and_ends_the_relay(program: Program) -> None:
    """systemd sends SIGABRT to a hanging relay."""
    assert program.stop(signal.SIGABRT) == -signal.SIGABRT
    assert re.findall(r" threads +count=1 names=(\S+)", program.log)[:2] == ["server", "MainThread"]
    assert "relay/net/receiver.py" in program.log
    assert "Fatal Python error" not in program.log
    assert program.credential.password not in program.log


def test_a_fatal_signal_of_c_code_writes_the_stacks(program: Program) -> None:
    assert program.stop(signal.SIGSEGV) == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in program.log
    assert "relay/net/receiver.py" in program.log


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_a_dump_has_few_lines_despite_many_allocations(
    start_program: ProgramStarter, tmp_path: Path, log_format: str
) -> None:
    """Equal stacks are one entry, so a dump fits the rate limit of any journal."""
    (tmp_path / "secret").write_text("0123456789abcdef" * 2)
    program = start_program("--log-format", log_format, "--relay-secret-file", str(tmp_path / "secret"))
    with contextlib.ExitStack() as stack:
        for number in range(ALLOCATIONS):
            credential = mint(RelaySecret("0123456789abcdef" * 2), 2**31, str(number))
            stack.enter_context(TurnClient((program.host, 3478), credential, "127.0.0.1")).allocate()

        def lines() -> list[str]:
            before = program.log.count("\n")
            program.dump()
            return program.log.splitlines()[before:]

        def last_of(written: list[str]) -> tuple[int, str]:
            """Return the last group of threads."""
            if log_format == "json":
                last = [entry for entry in map(valid, written) if entry["event"] == "threads"][-1]
                return last["count"], last["names"][0]
            (found,) = re.findall(r" threads +count=(\d+) names=(\S+)$", "\n".join(written), re.MULTILINE)[-1:]
            return int(found[0]), found[1]

        # A new thread may not wait for packets yet.
        wait_until(lambda: last_of(lines())[0] == ALLOCATIONS)
        written = lines()
    assert len(written) <= 200
    assert last_of(written)[1] == "allocation-..."


@needs_ipv6
def test_an_ipv6_only_relay_works(start_program: ProgramStarter) -> None:
    program = start_program(hosts=("::1",))
    with TurnClient(("::1", 3478), program.credential) as client:
        (relayed,) = client.allocate(family=2)
        assert relayed[0] == "::1"


def test_the_relays_ports_are_rejected_as_peers_in_every_notation(start_program: ProgramStarter) -> None:
    program = start_program("--allow-peer", "127.0.0.0/8,::/0", "--public-ip6-addr", "::1") if HAS_IPV6 else start_program()
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate(dual=HAS_IPV6)
        for port in (3478, 8080):
            assert client.bind_channel(0x4000, (program.host, port)) == 403
            if HAS_IPV6:
                assert client.bind_channel(0x4000, ("::1", port, 0, 0)) == 403
                assert client.bind_channel(0x4000, (f"::ffff:{program.host}", port, 0, 0)) == 403


def test_the_probe_succeeds(program: Program) -> None:
    login = ("--username", program.credential.username, "--password", program.credential.password)
    done = run("probe", program.host, *login, "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout)


def test_a_wheel_runs_outside_the_source_tree(tmp_path: Path) -> None:
    tree = Path(__file__).parents[2]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(tmp_path)]
    pip += ["--no-deps", "--no-index", "--no-build-isolation"]
    source = tmp_path / "source"
    # A build leaves files in its source tree.
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
