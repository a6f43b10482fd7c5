"""The log in a real journal."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.log_lines import valid
from tests.support.process import COMMAND
from tests.support.program import kept_environment

JOURNALD = Path("/lib/systemd/systemd-journald")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not JOURNALD.exists() or shutil.which("systemd-cat") is None,
    reason="needs root and systemd-journald",
)

# systemd sets JOURNAL_STREAM for its services.
SCRIPT = r"""
mount -t tmpfs none /run && mkdir -p /run/systemd/journal /run/log/journal && mount --bind /dev/null /dev/kmsg || exit 9
"$0" & JOURNALD=$!
until [ -S /run/systemd/journal/stdout ]; do sleep 0.05; done
systemd-cat -t relay sh -c 'JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec "$@" >/dev/null' sh "$@" & RELAY=$!
wait_for() {
    until journalctl -D /run/log/journal -o cat | grep -q "$1" || ! kill -0 $RELAY; do sleep 0.1; done 2>/dev/null
}
if [ -n "$IS_READY" ]; then
    wait_for "$IS_READY" && kill -USR1 $RELAY && wait_for "end of dump" && kill -TERM $RELAY
fi
wait $RELAY
journalctl --sync
journalctl -D /run/log/journal -t relay -o json
kill $JOURNALD
"""
READY = "[^a-z]ready[^a-z]"


def journal(*options: str, is_ready: str = READY) -> list[tuple[int, str]]:
    """Run a relay with a dump in between; return the priorities and messages of its journal."""
    arguments = ("--standalone", "--health-check-addr", "127.0.0.1:0", "--control-endpoint", "127.0.0.1:0", *options)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", SCRIPT, str(JOURNALD), *COMMAND, *arguments],
        env=kept_environment() | {"IS_READY": is_ready},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    return [(int(entry["PRIORITY"]), entry["MESSAGE"]) for entry in entries]


ADDRESS = ("--public-ip4-addr", "127.0.0.1")


def test_events_have_the_journals_priority_and_no_time_of_their_own() -> None:
    written = journal(*ADDRESS)
    assert {priority for priority, _ in written} == {4, 6}
    for priority, message in written:
        assert message.startswith("WARN  " if priority == 4 else ("INFO  ", "    | ")), message


def test_lines_of_json_are_unchanged_in_the_journal() -> None:
    priorities = {"info": 6, "warning": 4}
    lines = journal(*ADDRESS, "--log-format", "json")
    assert len(lines) > 10
    for priority, line in lines:
        assert priorities[valid(line)["level"]] == priority


def test_a_usage_error_is_an_error_in_the_journal() -> None:
    ((priority, message),) = journal("--public-ip4-addr", "nonsense", is_ready="")
    assert priority == 3
    assert message.startswith("firezone-relay: ")
