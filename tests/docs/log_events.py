"""The events that the source has: found in its text, since no test could make all of them happen."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RELAY = Path(__file__).parents[2] / "relay"

_METHODS = {
    "debug": "debug",
    "info": "info",
    "warning": "warn",
    "error": "error",
    "exception": "error",
    "critical": "critical",
}
_LEVELS = {"DEBUG": "debug", "INFO": "info", "WARN": "warn", "WARNING": "warn", "ERROR": "error"}

# Whose events are named elsewhere: by the portal's channel, and by what a machine's settings are found to be.
_HANDED_ON = {("relay/actors/portal.py", "note.event"), ("relay/actors/system.py", "**finding._asdict()")}


class Logged(NamedTuple):
    """A call that logs."""

    target: str
    level: str
    event: str


class NoLiteralError(Exception):
    """An event's name is not written where it is logged."""


def events() -> set[Logged]:
    """Find all of them.

    Raises:
        NoLiteralError: one can't be found this way.
    """
    return {each for path in sorted(RELAY.rglob("*.py")) for each in _events_of(path)}


def _events_of(path: Path) -> Iterator[Logged]:
    name = str(path.relative_to(RELAY.parent))
    tree = ast.parse(path.read_text())
    loggers = dict(_loggers(tree))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Attribute(value=ast.Name(id=logger), attr=method) if logger in loggers and method in _METHODS:
                yield from _logged(name, call, loggers[logger], method)
            case ast.Attribute(attr="_note" | "_note_oddity"):
                yield from _noted(call)
    if path.name == "kernel_settings.py":
        yield from _found(tree)
    if path.parts[-2:] in {("logs", "log.py"), ("logs", "foreign.py")}:
        yield from _written_directly(tree)


def _logged(name: str, call: ast.Call, target: str, method: str) -> Iterator[Logged]:
    event = _text(call.args[0]) if call.args else None
    given = ast.unparse(call).partition("(")[2]
    if event is not None:
        yield Logged(target, _METHODS[method], event)
    elif not any(name == where and given.startswith(what) for where, what in _HANDED_ON):
        raise NoLiteralError(f"{name}:{call.lineno}: {ast.unparse(call)}")


def _noted(call: ast.Call) -> Iterator[Logged]:
    """Find what the portal's channel tells."""
    match call.args:
        case [ast.Attribute(attr=severity), ast.Constant(value=str(event))]:
            yield Logged("relay.actors.portal", _LEVELS[severity], event)
        case [ast.Constant(value=str(event))]:
            yield Logged("relay.actors.portal", "warn", event)


def _found(tree: ast.Module) -> Iterator[Logged]:
    """Find what is said about this machine."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id="event")], value=ast.Constant(value=str(event))):
                yield Logged("relay.actors.system", "warn", event)


def _loggers(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(attr="get_logger"), args=[ast.Constant(value=str(target))]),
            ):
                yield name, target


def _written_directly(tree: ast.Module) -> Iterator[Logged]:
    """Find what the log writes about itself and for others."""
    constants = {
        node.targets[0].id: text
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (text := _text(node.value)) is not None
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        match call.args:
            case [ast.Name(id=target), ast.Attribute(value=ast.Name(id="Level"), attr=level), event, *_]:
                pass
            case [_, ast.Attribute(value=ast.Name(id="Level"), attr=level), ast.Name(id=target), event, *_]:
                pass
            case [ast.Attribute(value=ast.Name(id="record")), ast.Name(id="level"), event, *_]:
                for level in ("WARN", "ERROR"):
                    yield Logged("(library)", _LEVELS[level], _text(event) or "")
                continue
            case _:
                continue
        text = _text(event)
        if text is not None:
            yield Logged(constants[target], _LEVELS[level], text)


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
