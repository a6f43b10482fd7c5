"""The fuzz targets, and the locations of their inputs."""

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, cast

TARGETS = ("stun", "server", "portal", "http", "log_filter")

CORPUS = Path(__file__).parent / "corpus"


class Target(Protocol):
    """A fuzz target."""

    MODULES: Sequence[str]
    """The tested modules, for the line coverage."""
    SEEDS: Sequence[bytes]
    """Initial inputs."""

    def run(self, data: bytes) -> None:
        """Run an input; raise if a check fails."""


def module_of(name: str) -> str:
    return f"tests.fuzz.targets.{name}"


def load(name: str) -> Target:
    return cast(Target, importlib.import_module(module_of(name)))


def run_all(target: Target, inputs: Iterable[bytes]) -> None:
    for data in inputs:
        target.run(data)


def corpus(name: str) -> list[Path]:
    """Return the files of a target's corpus."""
    return sorted(path for path in (CORPUS / name).iterdir() if path.is_file())


def name_of(data: bytes) -> str:
    """Return a name derived from an input's content."""
    return hashlib.sha256(data).hexdigest()[:16]
