"""CPU affinity, scheduling and switch interval follow the settings, and are restored at the end."""

import contextlib
import ctypes
import errno
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from relay.config import PortalAccess, Timeouts, UsageError
from relay.core.credentials import RelaySecret, mint
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.net.endpoint import Endpoint
from relay.net.threads import STACK_SIZE, current_cpu, names, yield_cpu
from relay.system.system import System
from tests.support.program import Program
from tests.support.system import CONFIG, Relay, RelayMaker
from tests.support.system import make_relay as make_relay  # noqa: PLC0414 - a fixture
from tests.support.system import relay as relay  # noqa: PLC0414 - likewise
from tests.support.turn_client import TurnClient, udp_socket
from tests.support.waiting import wait_until

SECRET = "secret of the threads"
SCHEDULERS = {0: "interrupts", os.SCHED_BATCH: "waits"}

# Numbers of system calls that sandboxes forbid (such as systemd's @resources), by architecture.
CALLS = {
    "x86_64": {"sched_setaffinity": 203, "sched_setscheduler": 144},
    "aarch64": {"sched_setaffinity": 122, "sched_setscheduler": 119},
}


def shared() -> tuple[set[int], float, int]:
    """Return affinity and switch interval of this thread, and the defaults of new threads."""
    return os.sched_getaffinity(0), sys.getswitchinterval(), threading.stack_size()


@pytest.fixture(autouse=True)
def _all_is_put_back() -> Iterator[None]:
    before = shared()
    yield
    assert shared() == before


def affinities(pid: int | str) -> dict[int, str]:
    """Return the CPU list of each thread of a process, in the kernel's format."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end meanwhile.
        with contextlib.suppress(OSError):
            lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            found[int(task.name)] = lines["Cpus_allowed_list"].strip()
    return found


def schedulers() -> dict[int, str]:
    """Return for each thread of this process whether its wake-ups preempt other threads."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found[int(task.name)] = SCHEDULERS[os.sched_getscheduler(int(task.name))]
    return found


def named(prefix: str) -> set[int]:
    """Return the threads with a name prefix."""
    return {each.native_id for each in threading.enumerate() if each.native_id and each.name.startswith(prefix)}


def cpus_of_a_relay(make_relay: RelayMaker, **settings: object) -> set[str]:
    """Start a relay with threads of all kinds, and return the CPUs of these threads and the main thread."""
    # Threads of an earlier test may be ending.
    before = set(affinities("self")) - {threading.get_native_id()}
    make_relay(**settings).client().allocate()
    found = {cpus for thread, cpus in affinities("self").items() if thread not in before}
    assert len(threading.enumerate()) > 5
    return found


def test_all_threads_run_on_one_allowed_cpu(make_relay: RelayMaker) -> None:
    usable = os.sched_getaffinity(0)
    (cpu,) = cpus_of_a_relay(make_relay)
    assert int(cpu) in usable


@pytest.mark.parametrize("cpu", sorted(os.sched_getaffinity(0)))
def test_all_threads_run_on_the_requested_cpu(make_relay: RelayMaker, cpu: int) -> None:
    assert cpus_of_a_relay(make_relay, cpu=cpu) == {str(cpu)}


def test_threads_keep_all_cpus_without_affinity(make_relay: RelayMaker) -> None:
    before = affinities("self")[threading.get_native_id()]
    assert cpus_of_a_relay(make_relay, cpu=None) == {before}


def test_a_disallowed_cpu_is_a_usage_error_and_changes_nothing() -> None:
    before = shared()
    with (
        pytest.raises(UsageError, match="can't run on CPU 99999: --cpu-affinity takes one of"),
        System(replace(CONFIG, cpu=99_999)),
    ):
        pytest.fail("it started")
    assert shared() == before


def test_a_failed_start_restores_affinity_and_switch_interval() -> None:
    before = shared()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Endpoint("127.0.0.1", other.getsockname()[1])
        with pytest.raises(UsageError, match="in use"), System(replace(CONFIG, health=taken)):
            pytest.fail("it started")
    assert shared() == before


def test_the_switch_interval_is_restored_at_the_end() -> None:
    before = sys.getswitchinterval()
    with System(replace(CONFIG, switch_interval=0.25)):
        assert sys.getswitchinterval() == pytest.approx(0.25)
    assert sys.getswitchinterval() == before


def test_only_relaying_threads_use_the_batch_scheduler(make_relay: RelayMaker) -> None:
    """Preemption costs two context switches per data packet. The few requests must preempt data."""
    earlier = set(schedulers()) - {threading.get_native_id()}
    client = make_relay(timeouts=Timeouts(look_at_neighbours=3600)).client()
    before = set(schedulers())
    client.allocate()
    of_the_allocation = set(schedulers()) - before
    assert len(of_the_allocation) == 1
    # HTTP pages may be slow, too.
    relaying = of_the_allocation | named("listener-") | named("health") | named("control")
    assert len(relaying) > len(CONFIG.public_hosts)
    # Each thread sets its own scheduler first.
    wait_until(lambda: {how for thread, how in schedulers().items() if thread in relaying} == {"waits"})
    others = {thread: how for thread, how in schedulers().items() if thread not in relaying | earlier}
    assert set(others.values()) == {"interrupts"}
    assert named("requests-") | named("server") <= set(others)


def test_relaying_threads_preempt_a_busy_neighbour(make_relay: RelayMaker) -> None:
    """Otherwise nearly every packet waits for the neighbour's time slice, 3 ms."""
    client = make_relay(timeouts=Timeouts(look_at_neighbours=0.01)).client()
    (cpu,) = os.sched_getaffinity(next(iter(named("listener-"))))
    code = f"import os; os.sched_setaffinity(0, [{cpu}])\nwhile True: pass"
    with subprocess.Popen((sys.executable, "-c", code)) as neighbour:
        try:
            wait_until(lambda: {schedulers()[thread] for thread in named("listener-")} == {"interrupts"})
            before = set(schedulers())
            client.allocate()
            (of_the_allocation,) = set(schedulers()) - before
            wait_until(lambda: schedulers()[of_the_allocation] == "interrupts")
        finally:
            neighbour.kill()


def test_portal_threads_do_not_use_the_batch_scheduler() -> None:
    """A busy relaying thread must not starve the connection to the portal."""
    with socket.create_server(("127.0.0.1", 0)) as portal:
        url = PortalUrl.parse(f"ws://127.0.0.1:{portal.getsockname()[1]}")
        with System(replace(CONFIG, portal=PortalAccess(url, PortalToken.parse("token")))):
            connection, _ = portal.accept()
            with connection:
                found = schedulers()
                assert {found[thread] for thread in named("portal")} == {"interrupts"}
                assert len(named("portal")) == 2


def test_new_threads_have_small_stacks(relay: Relay) -> None:
    """8 MiB for each of thousands of allocations could exceed the address space limit of a container."""
    libc = ctypes.CDLL(None)
    before = set(names())
    relay.client().allocate()
    # The response may be sent before the thread has run.
    wait_until(lambda: not set(names()) <= before)
    listeners = {thread for thread, name in names().items() if name.startswith("listener-")}
    assert listeners
    for thread in (set(names()) - before) | listeners:
        attributes, size = ctypes.create_string_buffer(64), ctypes.c_size_t()
        assert libc.pthread_getattr_np(ctypes.c_ulong(thread), attributes) == 0
        assert libc.pthread_attr_getstacksize(attributes, ctypes.byref(size)) == 0
        libc.pthread_attr_destroy(attributes)
        # The C library may add a page or two.
        assert STACK_SIZE <= size.value <= STACK_SIZE + 64 * 1024


def test_a_yield_releases_the_interpreter_lock() -> None:
    started, done = threading.Event(), threading.Event()

    def spin() -> None:
        started.set()
        while not done.is_set():
            yield_cpu()

    spinning = threading.Thread(target=spin, daemon=True)
    interval = sys.getswitchinterval()
    # A thread that yields only the CPU would keep the interpreter lock for this interval.
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


def test_the_current_cpu_is_allowed() -> None:
    before = os.sched_getaffinity(0)
    try:
        for cpu in before:
            os.sched_setaffinity(0, {cpu})
            # The kernel moves the thread by its next system call.
            assert current_cpu() == cpu
    finally:
        os.sched_setaffinity(0, before)


def run_program(directory: Path, *options: str, variables: dict[str, str] | None = None) -> set[str]:
    """Start a program, check that packets are relayed, and return the CPUs of its threads."""
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
def test_the_program_applies_option_and_variable(
    tmp_path: Path, options: tuple[str, ...], variables: dict[str, str]
) -> None:
    everywhere = affinities("self")[threading.get_native_id()]
    expected = {everywhere} if "off" in options else {CPU, everywhere}
    # The threads for signals and the log started earlier.
    assert run_program(tmp_path, *options, variables=variables) == expected


class _Instructions(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("first", ctypes.c_char_p))


def forbid(*calls: str) -> None:
    """Make system calls fail with EPERM, in this thread and its child processes."""
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
def test_the_relay_runs_in_a_sandbox_without_scheduler_calls(tmp_path: Path, call: str) -> None:
    """Many sandboxes forbid all of systemd's @resources."""

    def start() -> set[str]:
        forbid(call)
        return run_program(tmp_path)

    # A seccomp filter is permanent, so use a temporary thread.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(start).result(110)
