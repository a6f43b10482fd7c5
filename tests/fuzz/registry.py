"""What is fuzzed, and where its inputs are."""

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, cast

TARGETS = ("stun", "server", "portal", "http", "log_filter")

CORPUS = Path(__file__).parent / "corpus"


class Target(Protocol):
    """One of them."""

    MODULES: Sequence[str]
    """What it is about: lines of these are counted."""
    SEEDS: Sequence[bytes]
    """Inputs to begin with."""

    def run(self, data: bytes) -> None:
        """Take one input; raises if anything is otherwise than it must be."""


def module_of(name: str) -> str:
    return f"tests.fuzz.targets.{name}"


def load(name: str) -> Target:
    return cast(Target, importlib.import_module(module_of(name)))


def run_all(target: Target, inputs: Iterable[bytes]) -> None:
    for data in inputs:
        target.run(data)


def corpus(name: str) -> list[Path]:
    """Give the inputs that are kept."""
    return sorted(path for path in (CORPUS / name).iterdir() if path.is_file())


def name_of(data: bytes) -> str:
    """Name an input by what is in it."""
    return hashlib.sha256(data).hexdigest()[:16]
