"""What a relay says that a bug ends: in its log, and not beside it."""

import queue
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from relay import process
from relay.config import BadUseError, LogFormat
from relay.ops.logs.filter import LogFilter
from relay.ops.logs.log import writing
from tests.actors.conftest import CONFIG
from tests.log_lines import valid


def served(monkeypatch: pytest.MonkeyPatch, path: Path, error: Exception) -> int:
    """Give the exit code of a relay that fails at its start."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(process, "System", fail)
    with path.open("w") as target, writing(LogFormat.JSON, LogFilter.parse("error"), target) as log:
        return process._serve(CONFIG, queue.SimpleQueue(), None, log)


def test_a_bug_ends_it_with_1_and_one_line_with_its_stack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "log"
    assert served(monkeypatch, path, ZeroDivisionError("by \x1b[31m\n")) == 1
    entry = valid(path.read_text())
    assert (entry["level"], entry["event"]) == ("critical", "the relay failed: please report this")
    assert "in fail" in entry["exception"]
    assert capsys.readouterr() == ("", "")
    assert sys.exc_info() == (None, None, None)


def test_what_the_user_can_mend_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with pytest.raises(BadUseError):
        served(monkeypatch, path, BadUseError("give another address"))
    assert path.read_text() == ""
