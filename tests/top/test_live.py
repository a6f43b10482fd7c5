"""The screen, the keys, and the state of the terminal afterwards."""

import re
import shlex
import signal
from http import HTTPStatus

import pytest

from relay.ops.http.endpoint import Page
from tests.support.process import COMMAND
from tests.support.terminal import HOST, Stage, Terminal, TerminalMaker, running

ALTERNATE, MAIN = b"\x1b[?1049h", b"\x1b[?1049l"


def clients_in(terminal: Terminal) -> list[str]:
    """The clients of the rows, from the top."""
    return re.findall(r"^203\.0\.113\.5:(\d+)", terminal.text, re.MULTILINE)


def test_the_screen_shows_throughput_and_busiest_allocations_first(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(5, 1, 9)
    terminal = start()
    terminal.shows("firezone-relay 0.1.0", "ready", "40003")
    terminal.until(lambda: clients_in(terminal) == ["40003", "40001", "40002"])
    stage.relay(0, 125, 25)
    # Total to peers: 150 packets of 1000 bytes in a second.
    terminal.shows("1.20Mb/s", "150 pkt/s", "1.00Mb/s", "200kb/s", "1-3 of 3 by rate, largest first")
    terminal.until(lambda: clients_in(terminal) == ["40002", "40003", "40001"])
    terminal.shows("█")
    assert f"{HOST}:{stage.port}" in terminal.lines[0]
    # The cursor stays on the last character of a full line: clearing the rest would clear this character.
    assert re.search(rb"%d(\x1b\[[0-9;]*m)*\x1b\[K" % stage.port, terminal.raw) is None


def test_keys_change_the_sort_order(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(1, 9, 5)
    terminal = start()
    terminal.shows("40003")
    terminal.press("t")
    terminal.until(lambda: clients_in(terminal) == ["40002", "40003", "40001"] and "by traffic" in terminal.text)
    terminal.press("c")
    terminal.until(lambda: clients_in(terminal) == ["40001", "40002", "40003"] and "by client" in terminal.text)
    for key, sort in (("a", "age"), ("e", "expiry"), ("p", "port"), ("n", "channels"), ("r", "rate")):
        terminal.press(key)
        terminal.shows(f"by {sort}, ")


def test_keys_scroll_the_list(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(*[0] * 40)
    terminal = start("--sort", "client")
    terminal.shows("1-16 of 40 by client")
    terminal.press("\x1b[B")
    terminal.shows("2-17 of 40", "40017")
    terminal.press("\x1b[6~")
    terminal.shows("17-32 of 40", "40032")
    terminal.press("G")
    terminal.shows("25-40 of 40", "40040")
    terminal.press("\x1b[A")
    terminal.shows("24-39 of 40")
    terminal.press("\x1b[H")
    terminal.shows("1-16 of 40", "40001")


def test_the_screen_fits_a_resized_terminal(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(*[1] * 40)
    # Long interval: the resize causes the redraw, not the timer.
    terminal = start("--interval", "60")
    terminal.shows("1-16 of 40", "LEFT")
    stage.relay()
    terminal.shows("0b/s")
    assert "PEERS" not in terminal.text
    terminal.resize(200, 50)
    terminal.shows("1-40 of 40", "PEERS", "198.51.100.9:5000")
    terminal.until(lambda: "quit" in terminal.lines[-1])
    terminal.resize(46, 8)
    terminal.until(lambda: "1-3 of 40" in terminal.lines[-1] and "TO PEER" in terminal.text and "pkt/s" in terminal.text)
    assert "AGE" not in terminal.text
    assert "quit" not in terminal.lines[0]
    terminal.resize(80, 24)
    terminal.until(lambda: "1-16 of 40" in terminal.lines[-1] and "LEFT" in terminal.text)


def test_a_terminal_without_a_size_gets_the_default_size(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(1)
    terminal = start(says_size=False)
    terminal.shows("40001")
    terminal.until(lambda: terminal.lines[-1].endswith("a age"))


def test_help_lists_keys_and_closes(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(1)
    terminal = start()
    terminal.shows("40001")
    terminal.press("h")
    terminal.shows("pause or resume", "q Ctrl-C")
    assert clients_in(terminal) == []
    terminal.press("?")
    terminal.until(lambda: clients_in(terminal) == ["40001"])


def test_a_pause_freezes_the_screen(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(1)
    terminal = start()
    terminal.shows("40001")
    terminal.press(" ")
    terminal.shows("paused")
    asked = len(stage.queries)
    stage.relay(0, 9)
    # These keys redraw the screen, without new data.
    for key, shown in (("h", "pause or resume"), ("h", "40001")):
        terminal.press(key)
        terminal.shows(shown)
    # A request may have been in flight.
    assert len(stage.queries) - asked <= 1
    assert "40002" not in terminal.text
    terminal.press(" ")
    terminal.until(lambda: "40002" in terminal.text and "paused" not in terminal.text)


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_the_quit_key_restores_the_terminal(stage: Stage, start: TerminalMaker, key: str) -> None:
    stage.relay(1)
    terminal = start()
    terminal.shows("40001")
    assert ALTERNATE in terminal.raw
    assert not terminal.is_as_before()
    terminal.press(key)
    assert terminal.ends() == 0
    assert terminal.is_as_before()
    # Nothing is written after the switch back to the main screen.
    assert terminal.raw.rpartition(MAIN)[2] == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_restores_the_terminal(stage: Stage, start: TerminalMaker, number: signal.Signals) -> None:
    stage.relay(1)
    terminal = start()
    terminal.shows("40001")
    terminal.process.send_signal(number)
    assert terminal.ends() == (0 if number is signal.SIGINT else 128 + number)
    assert terminal.is_as_before()


def test_a_lost_relay_is_reported_and_found_again(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(3)
    terminal = start()
    terminal.shows("40001")
    stage.close()
    terminal.shows("no answer for", "connection refused", "40001")
    stage.open()
    terminal.until(lambda: "no answer" not in terminal.text and "40001" in terminal.text)


def test_a_restart_of_the_relay_resets_rates(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(50)
    terminal = start()
    terminal.shows("40001", "50.0kB")
    stage.start_again(1)
    terminal.shows("1.00kB", "up 1s")
    terminal.until(lambda: "-" in terminal.lines[2])


def test_an_invalid_response_is_shown_on_the_screen(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(1)
    terminal = start(width=120)
    terminal.shows("40001")
    stage.answer = lambda _: Page(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "too \x1b[31m much"})
    terminal.shows("HTTP status 503 (too ?[31m much)")
    stage.answer = lambda _: Page(HTTPStatus.OK, {"version": 1})
    terminal.shows("is no relay of this version")
    stage.answer = stage.watched.page
    terminal.until(lambda: "no answer" not in terminal.text)


def test_ctrl_z_restores_the_terminal_and_fg_redraws(stage: Stage) -> None:
    stage.relay(1)
    shell = Terminal(running("bash", "--norc", "--noprofile", "-i"), env={"PS1": "shell> ", "HISTFILE": ""})
    try:
        shell.shows("shell>")
        shell.press(f"{shlex.join(COMMAND)} top --control-endpoint {HOST}:{stage.port}\n")
        shell.shows("1-1 of 1", "40001")
        shell.press("\x1a")
        shell.until(lambda: b"Stopped" in shell.raw)
        shell.prompts(after=b"Stopped")
        assert shell.raw.rfind(MAIN) > shell.raw.rfind(ALTERNATE)
        shell.press("fg\n")
        shell.until(lambda: shell.raw.rfind(ALTERNATE) > shell.raw.rfind(MAIN))
        taken_again = len(shell.raw)
        shell.until(lambda: b"40001" in shell.raw[taken_again:])
        shell.press("q")
        shell.until(lambda: shell.raw.rfind(MAIN) > taken_again)
        shell.prompts(after=MAIN)
        shell.press("echo code:$?\n")
        shell.until(lambda: b"code:0" in shell.raw)
        shell.press("exit\n")
        shell.ends()
    finally:
        shell.close()


def test_a_terminal_without_unicode_gets_ascii(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(1)
    latin = {"LC_ALL": "POSIX", "LANG": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    # The interpreter reads the encoding at startup.
    terminal = start(env=latin, real=True)
    terminal.shows("ready", "40001")
    stage.relay(100)
    terminal.shows("800kb/s")
    assert terminal.raw.isascii()


def test_colours_can_be_disabled(stage: Stage, start: TerminalMaker) -> None:
    stage.relay(1)
    terminal = start(env={"NO_COLOR": "1"})
    terminal.shows("40001")
    assert re.search(rb"\x1b\[[0-9;]*3[0-7]m", terminal.raw) is None
