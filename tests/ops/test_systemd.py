"""Messages to systemd, with and without systemd as the parent."""

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.ops.systemd import Systemd
from tests.support.log_lines import capture_logs
from tests.support.waiting import PATIENCE, wait_until

WATCHDOG = {"WATCHDOG_USEC": "40000"}
"""A watchdog with an interval of 20 ms."""

WORKS, HANGS = True, False
"""Results of liveness checks."""


class Notified:
    """systemd's end of the notify socket."""

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(30)
        # For "" the kernel chooses an abstract name, which begins with a NUL.
        self.socket.bind(name)
        self.environ = {"NOTIFY_SOCKET": name or "@" + self.socket.getsockname()[1:].decode()}

    def next(self) -> list[str]:
        """Return the fields of a message."""
        return self.socket.recv(4096).decode().split("\n")

    def is_silent(self) -> bool:
        """Return whether no message is queued."""
        return select.select([self.socket], [], [], 0)[0] == []


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[Notified]:
    notified = Notified(str(tmp_path / "notify"))
    with notified.socket:
        yield notified


@pytest.fixture
def start() -> Iterator[Callable[..., Systemd]]:
    """Create notifiers, and close them at the end."""
    made: list[Systemd] = []

    def start(environ: dict[str, str], **more: str) -> Systemd:
        made.append(Systemd(environ | more))
        return made[-1]

    yield start
    for each in made:
        each.close()


Start = Callable[..., Systemd]


def watchdog_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "watchdog"]


class Asked:
    """A liveness check with scripted results; the last result repeats."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.times = threading.Semaphore(0)
        self.patience: list[float] = []

    def __call__(self, seconds: float) -> bool:
        self.patience.append(seconds)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.times.release()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, times: int) -> None:
        """Wait for a number of checks."""
        for _ in range(times):
            assert self.times.acquire(timeout=30)


def test_without_systemd_nothing_is_sent_or_logged(start: Start) -> None:
    with capture_logs() as logs:
        systemd = start(WATCHDOG)
        systemd.watch(Asked(WORKS))
        systemd.ready("ready")
        systemd.status("busy")
        systemd.stopping("stopping", 3)
    assert watchdog_threads() == []
    assert logs == []


def test_ready_is_sent_with_a_status_to_a_path_socket(notified: Notified, start: Start) -> None:
    start(notified.environ).ready("answers clients")
    assert notified.next() == ["READY=1", "STATUS=answers clients"]


def test_an_address_with_an_at_sign_is_an_abstract_socket(start: Start) -> None:
    notified = Notified("")
    with notified.socket:
        start(notified.environ).ready("answers clients")
        assert notified.next() == ["READY=1", "STATUS=answers clients"]


def test_a_status_is_sent_alone(notified: Notified, start: Start) -> None:
    start(notified.environ).status("1 allocation")
    assert notified.next() == ["STATUS=1 allocation"]


@pytest.mark.parametrize("line_break", ["\n", "\r", "\0", "\u2028", "\udcff"])
def test_a_status_cannot_inject_a_field(notified: Notified, start: Start, line_break: str) -> None:
    start(notified.environ).ready(f"ready{line_break}WATCHDOG=trigger")
    assert notified.next() == ["READY=1", "STATUS=ready WATCHDOG=trigger"]


def test_a_long_status_is_cut_to_the_limit_of_systemd(notified: Notified, start: Start) -> None:
    start(notified.environ).ready("\U0001f4e6" * 10_000)
    message = notified.socket.recv(65536)
    assert message.startswith(b"READY=1\nSTATUS=\xf0")
    assert len(message) <= 4096


def test_stopping_is_sent_with_an_extended_timeout(notified: Notified, start: Start) -> None:
    start(notified.environ).stopping("drains", 90.5)
    assert notified.next() == ["STOPPING=1", "STATUS=drains", "EXTEND_TIMEOUT_USEC=90500000"]


def test_a_missing_socket_is_logged_once(tmp_path: Path, start: Start) -> None:
    with capture_logs() as logs:
        systemd = start({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
        systemd.ready("ready")
        systemd.stopping("stops", 1)
    (entry,) = logs
    assert (entry["event"], entry["log_level"]) == ("systemd can't be told", "warning")


def test_messages_reach_a_socket_that_was_created_again(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "notify"
    before = Notified(str(path))
    systemd = start(before.environ)
    before.socket.close()
    systemd.status("lost")
    path.unlink()
    after = Notified(str(path))
    with after.socket:
        systemd.status("heard")
        assert after.next() == ["STATUS=heard"]


def test_a_full_socket_does_not_block(notified: Notified, start: Start) -> None:
    queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    systemd = start(notified.environ)
    with capture_logs() as logs:
        for number in range(queue + 100):
            systemd.status(str(number))
    assert notified.next() == ["STATUS=0"]
    assert [entry["event"] for entry in logs] == ["systemd can't be told"]


@pytest.mark.parametrize(
    ("name", "garbage"),
    [
        ("NOTIFY_SOCKET", "vsock:2:1234"),
        ("NOTIFY_SOCKET", "relative/path"),
        ("NOTIFY_SOCKET", "/" + "x" * 200),
        ("WATCHDOG_USEC", "soon"),
        ("WATCHDOG_USEC", "0"),
        ("WATCHDOG_USEC", "-1"),
        ("WATCHDOG_USEC", "18446744073709551615"),
        ("WATCHDOG_USEC", "3" * 5000),
        ("WATCHDOG_PID", "me"),
    ],
)
def test_an_invalid_variable_is_logged_once_and_ignored(notified: Notified, start: Start, name: str, garbage: str) -> None:
    with capture_logs() as logs:
        systemd = start(notified.environ, **{name: garbage})
        systemd.watch(Asked(WORKS))
        systemd.ready("ready")
        systemd.status("ready")
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert watchdog_threads() == []
    assert notified.is_silent() == (name == "NOTIFY_SOCKET")


def test_an_invalid_watchdog_pid_does_not_disable_the_watchdog(notified: Notified, start: Start) -> None:
    start(notified.environ | WATCHDOG, WATCHDOG_PID="me").watch(Asked(WORKS))
    assert notified.next() == ["WATCHDOG=1"]


def test_without_watchdog_usec_no_thread_starts(notified: Notified, start: Start) -> None:
    start(notified.environ).watch(Asked(WORKS))
    assert watchdog_threads() == []


def test_the_watchdog_of_another_process_is_ignored(notified: Notified, start: Start) -> None:
    start(notified.environ | WATCHDOG, WATCHDOG_PID=str(os.getppid())).watch(Asked(WORKS))
    assert watchdog_threads() == []


def test_the_watchdog_is_notified_repeatedly(notified: Notified, start: Start) -> None:
    asked = Asked(WORKS)
    start(notified.environ | WATCHDOG, WATCHDOG_PID=str(os.getpid())).watch(asked)
    assert [notified.next() for _ in range(5)] == [["WATCHDOG=1"]] * 5
    assert all(each.daemon for each in watchdog_threads()), "it keeps no process from ending"
    assert all(0.01 < seconds < 0.02 for seconds in asked.patience), "an answer comes before the next question"


def test_a_report_is_due_shortly_before_the_watchdogs_timeout_at_each_check(notified: Notified) -> None:
    reports: list[float] = []
    systemd = Systemd(notified.environ | WATCHDOG, report_after=reports.append)
    systemd.watch(Asked(WORKS))
    assert [notified.next() for _ in range(3)] == [["WATCHDOG=1"]] * 3
    systemd.close()
    assert len(reports) >= 3
    assert reports == pytest.approx([0.036] * len(reports))


def test_a_hang_stops_notifications_and_is_logged_once(notified: Notified, start: Start) -> None:
    asked = Asked(HANGS)
    with capture_logs() as logs:
        start(notified.environ | WATCHDOG).watch(asked)
        asked.wait(4)
    assert notified.is_silent()
    (entry,) = logs
    assert (entry["event"], entry["log_level"]) == ("the server actor does not answer", "error")


def test_the_watchdog_is_notified_after_a_recovery(notified: Notified, start: Start) -> None:
    with capture_logs():
        start(notified.environ | WATCHDOG).watch(Asked(HANGS, HANGS, WORKS))
        assert notified.next() == ["WATCHDOG=1"]


def test_an_exception_in_a_check_counts_as_a_hang_and_checks_continue(notified: Notified, start: Start) -> None:
    failure = RuntimeError("a bug")
    with capture_logs() as logs:
        start(notified.environ | WATCHDOG).watch(Asked(failure, failure, WORKS))
        assert notified.next() == ["WATCHDOG=1"]
    (entry,) = logs
    assert entry["exc_info"] is failure


def test_nothing_is_sent_after_close(notified: Notified, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ops.systemd.CLOSE_TIMEOUT", 2 * PATIENCE)
    systemd = start(notified.environ, WATCHDOG_USEC="3600000000")
    systemd.watch(Asked(WORKS))
    began = time.monotonic()
    systemd.close()
    assert time.monotonic() - began < PATIENCE, "half an hour is not waited for"
    assert watchdog_threads() == []
    systemd.ready("ready")
    systemd.close()
    assert notified.is_silent()


@pytest.mark.parametrize("answer", [True, False])
def test_close_does_not_wait_for_a_pending_check(
    notified: Notified, start: Start, monkeypatch: pytest.MonkeyPatch, *, answer: bool
) -> None:
    monkeypatch.setattr("relay.ops.systemd.CLOSE_TIMEOUT", 0.02)
    asked, may_answer = threading.Event(), threading.Event()

    def is_alive(_: float) -> bool:
        asked.set()
        return may_answer.wait(3 * PATIENCE) and answer

    systemd = start(notified.environ | WATCHDOG)
    with capture_logs() as logs:
        systemd.watch(is_alive)
        assert asked.wait(PATIENCE)
        began = time.monotonic()
        systemd.close()
        assert time.monotonic() - began < PATIENCE
        may_answer.set()
        wait_until(lambda: watchdog_threads() == [])
    assert notified.is_silent()
    assert logs == []
