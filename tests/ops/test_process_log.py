"""The last event of a relay ended by a bug."""

import queue
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from relay.config import Config, LogFormat, UsageError
from relay.net.endpoint import Endpoint
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.log import writing
from relay.system.events import Event
from relay.system.process import serve
from tests.support.log_lines import valid
from tests.support.system import ANYWHERE, CONFIG


class Broken(queue.SimpleQueue[Event]):
    """A failing queue."""

    def get(self, *_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError("by \x1b[31m\n")


def served(config: Config, path: Path) -> int:
    """Run a relay with a bug; return its exit code."""
    with path.open("w") as target, writing(LogFormat.JSON, LogFilter.parse("error"), target) as log:
        return serve(config, Broken(), None, log)


def test_a_bug_ends_the_relay_with_code_1_and_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert served(CONFIG, path) == 1
    entry = valid(path.read_text())
    assert (entry["level"], entry["event"]) == ("critical", "the relay failed: please report this")
    assert "in get" in entry["exception"]
    assert capsys.readouterr() == ("", "")
    assert sys.exc_info() == (None, None, None)


def test_a_usage_error_is_not_logged(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with socket.create_server((ANYWHERE.host, 0)) as other:
        taken = Endpoint(ANYWHERE.host, other.getsockname()[1])
        with pytest.raises(UsageError):
            served(replace(CONFIG, health=taken), path)
    assert path.read_text() == ""
