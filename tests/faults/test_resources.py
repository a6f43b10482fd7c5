"""A machine that runs out of ports, descriptors or threads."""

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

from tests.support.failing import Failing, assert_serves, running
from tests.support.requirements import is_root, needs_ipv6, needs_nobody
from tests.support.system import RelayMaker, allocate_refused
from tests.support.waiting import wait_until

PORTS: Final = 40


GROUPS: Final = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
"""Directories for cgroups with a pids limit: version 1 and version 2."""


@contextlib.contextmanager
def half_taken(host: str) -> Iterator[int]:
    """Bind every second port of a free range, and return the first port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Outside the ephemeral port range.
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
def test_clients_get_all_ports_not_used_by_other_programs(make_relay: RelayMaker, host: str) -> None:
    """A port in use in one family is unusable for a dual allocation."""
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
def test_a_dual_allocation_with_one_free_descriptor_leaks_none(make_relay: RelayMaker) -> None:
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
    """A relay of an unprivileged user without other processes. Limits do not apply to root."""
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
    """Set the thread limit (RLIMIT_NPROC) of the relay's user."""
    status = Path(f"/proc/{program.process.pid}/status").read_text()
    user = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1]
    by = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    subprocess.run([*by, "prlimit", f"--nproc={soft}:", f"--pid={program.process.pid}"], check=True, timeout=60)


@is_root
@needs_nobody
def test_508_while_no_thread_can_start(of_somebody: Failing) -> None:
    """RLIMIT_NPROC and a pids limit both cause EAGAIN."""
    pid, (_, hard) = of_somebody.process.pid, resource.getrlimit(resource.RLIMIT_NPROC)
    with of_somebody.client() as served, of_somebody.client() as refused:
        served.allocate()
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        limit_threads(of_somebody, str(threads))
        assert allocate_refused(refused) == 508
        assert allocate_refused(refused) == 508
        assert served.refresh(600) is None
        limit_threads(of_somebody, "infinity" if hard == resource.RLIM_INFINITY else str(hard))
    assert of_somebody.counted("relay.bind_failures") == {"RuntimeError": 2}
    assert of_somebody.log.count("no sockets for allocations") == 1
    of_somebody.assert_serves()


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup with a pids limit."""
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


def test_508_until_the_cgroup_pids_limit_is_raised(group: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`TasksMax=` and `--pids-limit` set this limit."""
    with running(tmp_path_factory.mktemp("relay")) as program, program.client() as served, program.client() as refused:
        served.allocate()
        (group / "cgroup.procs").write_text(str(program.process.pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        assert allocate_refused(refused) == 508
        assert allocate_refused(refused) == 508
        assert served.refresh(600) is None
        (group / "pids.max").write_text("max")
        assert program.counted("relay.bind_failures") == {"RuntimeError": 2}
        program.assert_serves()
