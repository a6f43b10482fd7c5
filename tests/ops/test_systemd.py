"""What systemd hears, from a relay that it started and one that it did not."""

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from relay.ops import systemd as ops_systemd
from relay.ops.systemd import Systemd
from tests.conftest import PATIENCE, wait_until

WATCHDOG = {"WATCHDOG_USEC": "40000"}
"""A watchdog that wants to hear of the relay every 20 ms."""

WORKS, HANGS = True, False
"""What the server actor answers."""


class Notified:
    """systemd's end."""

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(30)
        # "" has the kernel make a name up: an abstract one, that begins with a NUL.
        self.socket.bind(name)
        self.environ = {"NOTIFY_SOCKET": name or "@" + self.socket.getsockname()[1:].decode()}

    def next(self) -> list[str]:
        """Give the fields of a message."""
        return self.socket.recv(4096).decode().split("\n")

    def is_silent(self) -> bool:
        """Tell whether no message waits."""
        return select.select([self.socket], [], [], 0)[0] == []


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[Notified]:
    notified = Notified(str(tmp_path / "notify"))
    with notified.socket:
        yield notified


@pytest.fixture
def start() -> Iterator[Callable[..., Systemd]]:
    """Make what is closed at the end."""
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
    """The server actor, as the watchdog sees it: it gives an answer for each question, the last one from then on."""

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
        """Wait until the watchdog has asked so often."""
        for _ in range(times):
            assert self.times.acquire(timeout=30)


def test_without_systemd_nothing_happens_and_nothing_is_logged(start: Start) -> None:
    with capture_logs() as logs:
        systemd = start(WATCHDOG)
        systemd.watch(Asked(WORKS))
        systemd.ready("ready")
        systemd.status("busy")
        systemd.stopping("stopping", 3)
    assert watchdog_threads() == []
    assert logs == []


def test_ready_is_said_with_a_status_to_a_socket_with_a_path(notified: Notified, start: Start) -> None:
    start(notified.environ).ready("answers clients")
    assert notified.next() == ["READY=1", "STATUS=answers clients"]


def test_an_address_that_begins_with_an_at_sign_is_a_name_in_the_kernel(start: Start) -> None:
    notified = Notified("")
    with notified.socket:
        start(notified.environ).ready("answers clients")
        assert notified.next() == ["READY=1", "STATUS=answers clients"]


def test_a_status_alone_is_said_alone(notified: Notified, start: Start) -> None:
    start(notified.environ).status("1 allocation")
    assert notified.next() == ["STATUS=1 allocation"]


@pytest.mark.parametrize("line_break", ["\n", "\r", "\0", "\u2028", "\udcff"])
def test_a_status_can_not_add_a_field_or_spoil_the_message(notified: Notified, start: Start, line_break: str) -> None:
    start(notified.environ).ready(f"ready{line_break}WATCHDOG=trigger")
    assert notified.next() == ["READY=1", "STATUS=ready WATCHDOG=trigger"]


def test_a_status_however_long_leaves_the_message_as_long_as_systemd_takes(notified: Notified, start: Start) -> None:
    start(notified.environ).ready("\U0001f4e6" * 10_000)
    message = notified.socket.recv(65536)
    assert message.startswith(b"READY=1\nSTATUS=\xf0")
    assert len(message) <= 4096


def test_a_stop_is_said_with_the_microseconds_it_may_take(notified: Notified, start: Start) -> None:
    start(notified.environ).stopping("drains", 90.5)
    assert notified.next() == ["STOPPING=1", "STATUS=drains", "EXTEND_TIMEOUT_USEC=90500000"]


def test_nobody_listening_is_said_once_and_ends_nothing(tmp_path: Path, start: Start) -> None:
    with capture_logs() as logs:
        systemd = start({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
        systemd.ready("ready")
        systemd.stopping("stops", 1)
    (entry,) = logs
    assert (entry["event"], entry["log_level"]) == ("systemd can't be told", "warning")


def test_a_systemd_that_comes_back_at_the_same_address_hears_again(tmp_path: Path, start: Start) -> None:
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


def test_a_systemd_that_does_not_read_is_not_waited_for(notified: Notified, start: Start) -> None:
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
def test_garbage_in_the_environment_is_logged_once_and_ignored(
    notified: Notified, start: Start, name: str, garbage: str
) -> None:
    with capture_logs() as logs:
        systemd = start(notified.environ, **{name: garbage})
        systemd.watch(Asked(WORKS))
        systemd.ready("ready")
        systemd.status("ready")
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert watchdog_threads() == []
    assert notified.is_silent() == (name == "NOTIFY_SOCKET")


def test_a_watchdog_whose_process_is_garbage_is_told_that_the_relay_works(notified: Notified, start: Start) -> None:
    start(notified.environ | WATCHDOG, WATCHDOG_PID="me").watch(Asked(WORKS))
    assert notified.next() == ["WATCHDOG=1"]


def test_without_a_watchdog_nobody_is_asked(notified: Notified, start: Start) -> None:
    start(notified.environ).watch(Asked(WORKS))
    assert watchdog_threads() == []


def test_the_watchdog_of_another_process_is_not_told(notified: Notified, start: Start) -> None:
    start(notified.environ | WATCHDOG, WATCHDOG_PID=str(os.getppid())).watch(Asked(WORKS))
    assert watchdog_threads() == []


def test_the_watchdog_hears_of_a_relay_that_works_again_and_again(notified: Notified, start: Start) -> None:
    asked = Asked(WORKS)
    start(notified.environ | WATCHDOG, WATCHDOG_PID=str(os.getpid())).watch(asked)
    assert [notified.next() for _ in range(5)] == [["WATCHDOG=1"]] * 5
    assert all(each.daemon for each in watchdog_threads()), "it keeps no process from ending"
    assert all(0.01 < seconds < 0.02 for seconds in asked.patience), "an answer comes before the next question"


def test_the_watchdog_hears_nothing_while_the_relay_does_not_work_and_the_log_has_it_once(
    notified: Notified, start: Start
) -> None:
    asked = Asked(HANGS)
    with capture_logs() as logs:
        start(notified.environ | WATCHDOG).watch(asked)
        asked.wait(4)
    assert notified.is_silent()
    (entry,) = logs
    assert (entry["event"], entry["log_level"]) == ("the server actor does not answer", "error")


def test_the_watchdog_hears_of_a_relay_that_works_again(notified: Notified, start: Start) -> None:
    with capture_logs():
        start(notified.environ | WATCHDOG).watch(Asked(HANGS, HANGS, WORKS))
        assert notified.next() == ["WATCHDOG=1"]


def test_a_question_that_fails_is_no_answer_and_not_the_last_one(notified: Notified, start: Start) -> None:
    failure = RuntimeError("a bug")
    with capture_logs() as logs:
        start(notified.environ | WATCHDOG).watch(Asked(failure, failure, WORKS))
        assert notified.next() == ["WATCHDOG=1"]
    (entry,) = logs
    assert entry["exc_info"] is failure


def test_closed_it_says_nothing_more(notified: Notified, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_systemd, "CLOSE_TIMEOUT", 2 * PATIENCE)
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
def test_a_question_under_way_holds_up_no_close_and_its_answer_is_not_told(
    notified: Notified, start: Start, *, answer: bool
) -> None:
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
