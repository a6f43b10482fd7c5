"""Log directives: any text is a filter or rejected in one short line; a filter can be formatted as directives."""

from relay.logger import Level
from relay.ops.logs.filter import MAX_DIRECTIVES, MAX_LENGTH, LogFilter

MODULES = ("relay.ops.logs.filter",)

SEEDS = (
    b"info",
    b"info,relay.core=debug,portal=trace",
    b"relay::core::server=off, relay.net = warn",
    b"relay.actors.portal=error,portal=debug,warning",
    b"=,,a=b,x.y.z=trace",
    b"off,core.server=critical",
)

_TARGETS = ("relay", "relay.core.server", "relay.core.portal.channel", "relay.actors.portal", "portal", "", "a.b.a.b.a")


def run(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        directives = LogFilter.parse(text)
    except ValueError as error:
        said = str(error)
        assert said.isprintable()
        assert said.isascii()
        assert len(said) < 600
        return
    assert 1 <= len(directives.directives) <= MAX_DIRECTIVES
    assert len(text) <= MAX_LENGTH
    again = LogFilter.parse(str(directives))
    for target in (*_TARGETS, *(".".join(each.parts) for each in directives.directives)):
        level = directives.threshold(target)
        assert isinstance(level, Level)
        assert again.threshold(target) is level
    assert again == directives
