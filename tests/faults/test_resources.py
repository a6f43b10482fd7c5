"""A machine that has no port, descriptor or thread to give: for a while, and to some."""

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.actors.conftest import RelayMaker
from tests.actors.test_lifetime import allocate_refused
from tests.conftest import needs_ipv6, wait_until
from tests.faults.conftest import Failing, assert_serves, running
from tests.interop.test_privilege import is_root, needs_nobody

PORTS: Final = 40


GROUPS: Final = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
"""Where control groups with a limit of pids are made: version 1, and 2."""


@contextlib.contextmanager
def half_taken(host: str) -> Iterator[int]:
    """Take every second one of some ports in a row, all of which were free; give the first."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # None of those that Linux gives to whoever asks for any.
    for lowest in range(20000, 30000, PORTS):
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(PORTS)]
            try:
                for number, each in enumerate(opened):
                    each.bind((host, lowest + number))
            except OSError:
                continue
            for each in opened[1::2]:
                each.close()
            yield lowest
            return
    pytest.skip("other programs of this machine have ports everywhere: NO RANGE of them is free")


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_clients_get_the_ports_that_other_programs_have_not_taken_and_all_of_them(make_relay: RelayMaker, host: str) -> None:
    """A port that is taken for one family is none for a client that asks for both."""
    dual = ":" in host
    with half_taken(host) as lowest:
        more = {} if dual else {"public_ip6": None}
        relay = make_relay(lowest_port=lowest, highest_port=lowest + PORTS - 1, **more)
        clients = [relay.client() for _ in range(PORTS // 2)]
        given = {client.allocate(dual=dual)[0][1] for client in clients}
        assert given == set(range(lowest + 1, lowest + PORTS, 2))
        with pytest.raises(AssertionError, match="was answered 508"):
            relay.client().allocate(dual=dual)
    refused = relay.system.server_counters.bind_errors
    assert set(refused) == {"EADDRINUSE"}
    assert refused["EADDRINUSE"] == relay.system.core.counters.ports_refused > 0
    assert_serves(relay)


@needs_ipv6
def test_a_client_that_finds_a_descriptor_for_one_family_only_gets_none_and_leaves_none_open(make_relay: RelayMaker) -> None:
    relay = make_relay()
    client = relay.client()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as first_free:
        limit = first_free.fileno() + 1
    before = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(AssertionError, match="was answered 508"):
            client.allocate(dual=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) == before)
    assert relay.system.server_counters.bind_errors == {"EMFILE": 1}
    assert_serves(relay)


@pytest.fixture
def of_somebody() -> Iterator[Failing]:
    """A relay of a user who has nothing else running, and no rights: limits are not for root."""
    user = 60000 + os.getpid() % 5000
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    ids = (f"--reuid={user}", f"--regid={user}", "--clear-groups")
    try:
        with running(directory, by=("setpriv", *ids, "--inh-caps=-all", "--bounding-set=-all")) as started:
            yield started
    finally:
        shutil.rmtree(directory)


def limit_threads(program: Failing, soft: str) -> None:
    """Set how many threads its user may have; which is that user's to do, not root's."""
    status = Path(f"/proc/{program.process.pid}/status").read_text()
    user = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1]
    by = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    subprocess.run([*by, "prlimit", f"--nproc={soft}:", f"--pid={program.process.pid}"], check=True, timeout=60)


@is_root
@needs_nobody
def test_508_without_a_thread_and_service_once_there_is_one(of_somebody: Failing) -> None:
    """As under a limit of pids: the kernel says EAGAIN to both."""
    pid, (_, hard) = of_somebody.process.pid, resource.getrlimit(resource.RLIMIT_NPROC)
    with of_somebody.client() as served, of_somebody.client() as refused:
        served.allocate()
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        limit_threads(of_somebody, str(threads))
        assert allocate_refused(refused) == 508
        assert allocate_refused(refused) == 508
        assert served.refresh(600) is None
        limit_threads(of_somebody, "infinity" if hard == resource.RLIM_INFINITY else str(hard))
    assert of_somebody.counted("bind_errors") == {"RuntimeError": 2}
    assert of_somebody.log.count("no sockets for allocations") == 1
    of_somebody.assert_serves()


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that can limit how many threads there are in it."""
    for parent in GROUPS:
        made = parent / f"relay-{os.getpid()}"
        with contextlib.suppress(OSError):
            made.mkdir()
            try:
                if (made / "pids.max").exists():
                    yield made
                    return
            finally:
                made.rmdir()
    pytest.skip("NO CONTROL GROUP with a limit of pids can be made here: run as root")


def test_508_at_the_limit_of_a_control_group_and_service_once_it_is_raised(
    group: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What `TasksMax=` and `--pids-limit` are."""
    with running(tmp_path_factory.mktemp("relay")) as program, program.client() as served, program.client() as refused:
        served.allocate()
        (group / "cgroup.procs").write_text(str(program.process.pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        assert allocate_refused(refused) == 508
        assert allocate_refused(refused) == 508
        assert served.refresh(600) is None
        (group / "pids.max").write_text("max")
        assert program.counted("bind_errors") == {"RuntimeError": 2}
        program.assert_serves()
