"""Find all events in the source's text: no test could cause all of them."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from relay.ops.logs.core import LOGGED_AS

RELAY = Path(__file__).parents[2] / "relay"

_METHODS = {
    "debug": "debug",
    "info": "info",
    "warning": "warn",
    "error": "error",
    "exception": "error",
    "critical": "critical",
}

# The portal's channel and the checks of kernel settings name these events.
_HANDED_ON = {("relay/actors/portal.py", "note.event"), ("relay/system/system.py", "**finding._asdict()")}


class Logged(NamedTuple):
    """A call that logs."""

    target: str
    level: str
    event: str


class NoLiteralError(Exception):
    """The name of an event is not a literal where the event is logged."""


def events() -> set[Logged]:
    """Return all events.

    Raises:
        NoLiteralError: the name of an event is not a literal.
    """
    of_core = {Logged(each.target, each.level.name.lower(), each.event) for each in LOGGED_AS.values()}
    return of_core | {each for path in sorted(RELAY.rglob("*.py")) for each in _events_of(path)}


def _events_of(path: Path) -> Iterator[Logged]:
    name = str(path.relative_to(RELAY.parent))
    tree = ast.parse(path.read_text())
    loggers = dict(_loggers(tree))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Attribute(value=ast.Name(id=logger), attr=method) if logger in loggers and method in _METHODS:
                yield from _logged(name, call, loggers[logger], method)
            case ast.Attribute(attr="_warn" | "_log_protocol_error" | "Note" as method):
                yield from _noted(call, "info" if method == "Note" else "warn")
    if path.name == "kernel_settings.py":
        yield from _found(tree)
    if path.name == "dump.py":
        yield from _dumped(tree)
    if path.parts[-2:] in {("logs", "log.py"), ("logs", "stdlib_bridge.py")}:
        yield from _of_the_log(tree)


def _logged(name: str, call: ast.Call, target: str, method: str) -> Iterator[Logged]:
    event = _text(call.args[0]) if call.args else None
    given = ast.unparse(call).partition("(")[2]
    if event is not None:
        yield Logged(target, _METHODS[method], event)
    elif not any(name == where and given.startswith(what) for where, what in _HANDED_ON):
        raise NoLiteralError(f"{name}:{call.lineno}: {ast.unparse(call)}")


def _noted(call: ast.Call, level: str) -> Iterator[Logged]:
    """Find the events of the portal's channel."""
    match call.args:
        case [ast.Constant(value=str(event)), *_]:
            yield Logged("relay.actors.portal", level, event)


def _found(tree: ast.Module) -> Iterator[Logged]:
    """Find the warnings about kernel settings."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(event))) if name.startswith("_"):
                yield Logged("relay.actors.system", "warn", event)


def _dumped(tree: ast.Module) -> Iterator[Logged]:
    """Find the entries of a dump."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="_write"), args=[_, ast.Constant(value=str(event))]):
                yield Logged("relay.ops.dump", "info", event)


def _loggers(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Name(id="Logger"), args=[ast.Constant(value=str(target))]),
            ):
                yield name, target


def _of_the_log(tree: ast.Module) -> Iterator[Logged]:
    """Find the log's reports about itself, and the events of libraries."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        match call:
            case ast.Call(func=ast.Attribute(attr="line"), args=[event]):
                yield Logged("relay.ops.logs", "warn", _text(event) or "")
            case ast.Call(func=ast.Attribute(attr="log"), args=[ast.Name(id="level"), ast.Constant(value=str(event))]):
                yield from (Logged("(library)", level, event) for level in ("warn", "error"))


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
