"""Line coverage of a call in some modules, to report coverage and to minimise a corpus."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeAlias

Line: TypeAlias = tuple[str, int]
Arc: TypeAlias = tuple[str, int, int]
"""A step from a line to the next line of the same function; a call starts from 0."""


def of(modules: Iterable[str]) -> set[Line]:
    """Return all lines of functions."""
    found: set[Line] = set()
    for name in modules:
        path = str(importlib.import_module(name).__file__)
        module = compile(Path(path).read_text(encoding="utf-8"), path, "exec")
        for code in _functions(module):
            # The first line runs in every call and adds no information to the second.
            found |= {(path, line) for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    return found


def arcs(modules: Iterable[str], call: Callable[[], object]) -> set[Arc]:
    """Return the steps from line to line in functions of some modules during a call."""
    paths = {str(importlib.import_module(name).__file__) for name in modules}
    found: set[Arc] = set()
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:  # noqa: ANN401 - the signature of sys.settrace
        path = frame.f_code.co_filename
        if path not in paths or frame.f_code.co_name == "<module>":
            return None
        if event == "call":
            last[id(frame)] = 0
        elif event == "line":
            found.add((path, last.get(id(frame), 0), frame.f_lineno))
            last[id(frame)] = frame.f_lineno
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return found


def _functions(code: CodeType) -> Iterator[CodeType]:
    for each in code.co_consts:
        if isinstance(each, CodeType):
            # Excludes class bodies, which run at import and lack the flag CO_OPTIMIZED.
            if each.co_flags & 1:
                yield each
            yield from _functions(each)
