"""Threads share one CPU and the interpreter as the operator says, and are left as they were found."""

import contextlib
import ctypes
import errno
import os
import platform
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from relay.actors.system import System
from relay.config import BadUseError, Endpoint, PortalAccess
from relay.core.credentials import RelaySecret, mint
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.ops.threads import STACK_SIZE, current_cpu, yield_cpu
from tests.actors.conftest import CONFIG, Relay, RelayMaker
from tests.actors.conftest import make_relay as make_relay  # noqa: PLC0414 - a fixture
from tests.actors.conftest import relay as relay  # noqa: PLC0414 - likewise
from tests.conftest import wait_until
from tests.interop.conftest import Program
from tests.turn_client import TurnClient, udp_socket

SECRET = "secret of the threads"
SCHEDULERS = {0: "interrupts", os.SCHED_BATCH: "waits"}

# The ways to call what sandboxes forbid (systemd's @resources, for one), by machine.
CALLS = {
    "x86_64": {"sched_setaffinity": 203, "sched_setscheduler": 144},
    "aarch64": {"sched_setaffinity": 122, "sched_setscheduler": 119},
}


def shared() -> tuple[set[int], float, int]:
    """What this thread was given of the machine, and what new ones would be."""
    return os.sched_getaffinity(0), sys.getswitchinterval(), threading.stack_size()


@pytest.fixture(autouse=True)
def _all_is_put_back() -> Iterator[None]:
    before = shared()
    yield
    assert shared() == before


def affinities(pid: int | str) -> dict[int, str]:
    """Give the CPUs that each thread of a process may use, as the kernel writes them."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        # It may end while it is looked at.
        with contextlib.suppress(OSError):
            lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            found[int(task.name)] = lines["Cpus_allowed_list"].strip()
    return found


def schedulers() -> dict[int, str]:
    """Tell for each thread of this process whether it interrupts others or waits for them."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found[int(task.name)] = SCHEDULERS[os.sched_getscheduler(int(task.name))]
    return found


def named(prefix: str) -> set[int]:
    """Give the threads whose names begin so."""
    return {each.native_id for each in threading.enumerate() if each.native_id and each.name.startswith(prefix)}


def cpus_of_a_relay(make_relay: RelayMaker, **settings: object) -> set[str]:
    """Start a relay with threads of all kinds, and give the CPUs of those threads and of the main one."""
    # Those of an earlier test may be about to end.
    before = set(affinities("self")) - {threading.get_native_id()}
    make_relay(**settings).client().allocate()
    found = {cpus for thread, cpus in affinities("self").items() if thread not in before}
    assert len(threading.enumerate()) > 5
    return found


def test_all_threads_are_on_one_cpu_that_the_process_may_use(make_relay: RelayMaker) -> None:
    usable = os.sched_getaffinity(0)
    (cpu,) = cpus_of_a_relay(make_relay)
    assert int(cpu) in usable


@pytest.mark.parametrize("cpu", sorted(os.sched_getaffinity(0)))
def test_all_threads_are_on_the_cpu_that_was_asked_for(make_relay: RelayMaker, cpu: int) -> None:
    assert cpus_of_a_relay(make_relay, cpu=cpu) == {str(cpu)}


def test_threads_that_are_to_be_left_alone_stay_on_all_cpus(make_relay: RelayMaker) -> None:
    before = affinities("self")[threading.get_native_id()]
    assert cpus_of_a_relay(make_relay, cpu=None) == {before}


def test_a_cpu_that_the_process_may_not_use_is_bad_use_and_changes_nothing() -> None:
    before = shared()
    with (
        pytest.raises(BadUseError, match="can't run on CPU 99999: --cpu-affinity takes one of"),
        System(replace(CONFIG, cpu=99_999)),
    ):
        pytest.fail("it started")
    assert shared() == before


def test_a_start_that_fails_puts_all_back() -> None:
    before = shared()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Endpoint("127.0.0.1", other.getsockname()[1])
        with pytest.raises(BadUseError, match="in use"), System(replace(CONFIG, health=taken)):
            pytest.fail("it started")
    assert shared() == before


def test_the_switch_interval_is_as_asked_for_until_the_system_ends() -> None:
    before = sys.getswitchinterval()
    with System(replace(CONFIG, switch_interval=0.25)):
        assert sys.getswitchinterval() == pytest.approx(0.25)
    assert sys.getswitchinterval() == before


def test_threads_that_relay_wait_for_others_and_those_that_others_wait_for_do_not(make_relay: RelayMaker) -> None:
    """Data is much, and a wake-up that interrupts costs two switches; requests are few, and must get through the data."""
    earlier = set(schedulers()) - {threading.get_native_id()}
    client = make_relay().client()
    before = set(schedulers())
    client.allocate()
    of_the_allocation = set(schedulers()) - before
    assert len(of_the_allocation) == 1
    # Pages are for who can wait, too.
    relaying = of_the_allocation | named("listener-") | named("health") | named("control")
    assert len(relaying) > len(CONFIG.public_hosts)
    # A thread says so of itself, as the first thing it does.
    wait_until(lambda: {how for thread, how in schedulers().items() if thread in relaying} == {"waits"})
    others = {thread: how for thread, how in schedulers().items() if thread not in relaying | earlier}
    assert set(others.values()) == {"interrupts"}
    assert named("requests-") | named("server") <= set(others)


def test_the_portals_threads_do_not_wait_for_those_that_relay() -> None:
    """One that relays without end must not cost the relay its place in the network."""
    with socket.create_server(("127.0.0.1", 0)) as portal:
        url = PortalUrl.parse(f"ws://127.0.0.1:{portal.getsockname()[1]}")
        with System(replace(CONFIG, portal=PortalAccess(url, PortalToken.parse("token")))):
            connection, _ = portal.accept()
            with connection:
                found = schedulers()
                assert {found[thread] for thread in named("portal")} == {"interrupts"}
                assert len(named("portal")) == 2


def test_new_threads_have_small_stacks(relay: Relay) -> None:
    """8 MiB for each of thousands of allocations would be more address space than many a container may have."""
    libc = ctypes.CDLL(None)
    before = set(sys._current_frames())
    relay.client().allocate()
    # It may be answered before its thread has run.
    wait_until(lambda: not set(sys._current_frames()) <= before)
    listeners = {each.ident for each in threading.enumerate() if each.ident and each.name.startswith("listener-")}
    for thread in (set(sys._current_frames()) - before) | listeners:
        attributes, size = ctypes.create_string_buffer(64), ctypes.c_size_t()
        assert libc.pthread_getattr_np(ctypes.c_ulong(thread), attributes) == 0
        assert libc.pthread_attr_getstacksize(attributes, ctypes.byref(size)) == 0
        libc.pthread_attr_destroy(attributes)
        # The C library may add a page or two of its own.
        assert STACK_SIZE <= size.value <= STACK_SIZE + 64 * 1024


def test_who_yields_lets_other_threads_have_the_interpreter() -> None:
    started, done = threading.Event(), threading.Event()

    def spin() -> None:
        started.set()
        while not done.is_set():
            yield_cpu()

    spinning = threading.Thread(target=spin, daemon=True)
    interval = sys.getswitchinterval()
    # Whoever gave up the CPU alone would be made to give up the interpreter only after so long.
    sys.setswitchinterval(100)
    try:
        before = time.monotonic()
        spinning.start()
        assert started.wait(60)
        done.set()
        spinning.join(60)
        assert time.monotonic() - before < 50
    finally:
        sys.setswitchinterval(interval)


def test_the_current_cpu_is_one_that_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        for cpu in before:
            os.sched_setaffinity(0, {cpu})
            # By the time of a system call after it, this thread was moved.
            assert current_cpu() == cpu
    finally:
        os.sched_setaffinity(0, before)


def run_program(directory: Path, *options: str, variables: dict[str, str] | None = None) -> set[str]:
    """Start a program, see that it relays, and give the CPUs that its threads may use."""
    secret = directory / "secret"
    secret.write_text(SECRET)
    program = Program(
        *("--standalone", "--allow-peer", "127.0.0.0/8", "--relay-secret-file", str(secret), *options),
        network=variables or {},
    )
    try:
        program.wait_until_ready()
        assert " ready " in program.log
        credential = mint(RelaySecret(SECRET), int(time.time()) + 600, "salt")
        with TurnClient((program.host, 3478), credential, "127.0.0.1") as client, udp_socket("127.0.0.1") as peer:
            (relayed,) = client.allocate()
            assert client.bind_channel(0x4000, peer.getsockname()) is None
            client.send(0x4000, b"there")
            assert peer.recv(1500) == b"there"
            peer.sendto(b"back", relayed[:2])
            assert client.receive() == (0x4000, b"back")
            return set(affinities(program.process.pid).values())
    finally:
        program.close()


CPU = str(max(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("options", "variables"), [(("--cpu-affinity", CPU), {}), ((), {"CPU_AFFINITY": CPU}), (("--cpu-affinity", "off"), {})]
)
def test_the_program_does_as_its_option_or_variable_says(
    tmp_path: Path, options: tuple[str, ...], variables: dict[str, str]
) -> None:
    everywhere = affinities("self")[threading.get_native_id()]
    expected = {everywhere} if "off" in options else {CPU, everywhere}
    # Those that wait for signals and write the log were there before.
    assert run_program(tmp_path, *options, variables=variables) == expected


class _Instructions(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("first", ctypes.c_char_p))


def forbid(*calls: str) -> None:
    """Let system calls fail with EPERM from now on, in this thread and the processes that it starts."""
    numbers = CALLS[platform.machine()]
    program = struct.pack("=HBBI", 0x20, 0, 0, 0)  # the number of the call
    for call in calls:
        program += struct.pack("=HBBI", 0x15, 0, 1, numbers[call]) + struct.pack(
            "=HBBI", 0x06, 0, 0, 0x00050000 | errno.EPERM
        )
    program += struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_no_new_privs, pr_set_seccomp, filter_mode = 38, 22, 2
    assert libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0) == 0
    instructions = _Instructions(len(program) // 8, program)
    assert libc.prctl(pr_set_seccomp, filter_mode, ctypes.byref(instructions)) == 0


@pytest.mark.skipif(platform.machine() not in CALLS, reason="the numbers of its system calls are not known here")
@pytest.mark.parametrize("call", ["sched_setaffinity", "sched_setscheduler"])
def test_a_sandbox_that_forbids_to_share_cpus_keeps_no_relay_from_running(tmp_path: Path, call: str) -> None:
    """Many forbid all of systemd's @resources."""

    def start() -> set[str]:
        forbid(call)
        return run_program(tmp_path)

    # What is forbidden can't be allowed again: that takes a thread which ends.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(start).result(110)
