"""The lock files: requirements/*.txt, which `make lock` writes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.markers import Marker
from packaging.utils import NormalizedName, canonicalize_name

FOLDER: Final = Path(__file__).parent.parent / "requirements"

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)(?: ; (?P<marker>[^\\]+))? \\")
_HASH = re.compile(r"    --hash=sha256:(?P<hash>[0-9a-f]{64})(?: \\)?")

LINUX: Final = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
"""Of the environment in which markers hold; the rest is this interpreter's."""


@dataclass(frozen=True)
class Pin:
    """One package in one version."""

    name: NormalizedName
    version: str
    marker: str | None
    """Where it is installed; None if everywhere."""
    hashes: tuple[str, ...]
    """SHA-256 of each of its files, in hexadecimal."""

    @property
    def is_for_linux(self) -> bool:
        """Tell whether it is installed on Linux, by this version of Python."""
        return self.marker is None or Marker(self.marker).evaluate(LINUX)


def read(name: str, folder: Path = FOLDER) -> list[Pin]:
    """Read a lock file.

    Args:
        name: without its suffix.
        folder: where it is.

    Raises:
        ValueError: there is something else in it than pins, hashes and comments.
    """
    pins: list[Pin] = []
    for number, line in enumerate((folder / f"{name}.txt").read_text(encoding="utf-8").splitlines(), 1):
        if pin := _PIN.fullmatch(line):
            pins.append(Pin(canonicalize_name(pin["name"]), pin["version"], pin["marker"], ()))
        elif (found := _HASH.fullmatch(line)) and pins:
            last = pins[-1]
            pins[-1] = Pin(last.name, last.version, last.marker, (*last.hashes, found["hash"]))
        elif line.strip() and not line.lstrip().startswith("#"):
            raise ValueError(f"{name}.txt:{number} is neither a pin nor a hash: {line}")
    return pins
