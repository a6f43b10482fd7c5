"""Reader of the lock files, requirements/*.txt, written by `make lock`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from packaging.markers import Marker
from packaging.utils import NormalizedName, canonicalize_name

FOLDER: Final = Path(__file__).parent.parent / "requirements"

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)(?: ; (?P<marker>[^\\]+))? \\")
_HASH = re.compile(r"    --hash=sha256:(?P<hash>[0-9a-f]{64})(?: \\)?")

LINUX: Final = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
"""Environment of markers, in addition to this interpreter's."""


@dataclass(frozen=True)
class Pin:
    """A package in one version."""

    name: NormalizedName
    version: str
    marker: str | None
    """Condition of the installation; None for no condition."""
    hashes: list[str] = field(default_factory=list)
    """SHA-256 of each file, in hexadecimal."""

    @property
    def is_for_linux(self) -> bool:
        """Return whether Linux needs the package, with this version of Python."""
        return self.marker is None or Marker(self.marker).evaluate(LINUX)


def read(name: str, folder: Path = FOLDER) -> list[Pin]:
    """Read a lock file by its name without suffix.

    Raises:
        ValueError: a line is neither a pin, nor a hash, nor a comment.
    """
    pins: list[Pin] = []
    for number, line in enumerate((folder / f"{name}.txt").read_text(encoding="utf-8").splitlines(), 1):
        if pin := _PIN.fullmatch(line):
            pins.append(Pin(canonicalize_name(pin["name"]), pin["version"], pin["marker"]))
        elif (found := _HASH.fullmatch(line)) and pins:
            pins[-1].hashes.append(found["hash"])
        elif line.strip() and not line.lstrip().startswith("#"):
            raise ValueError(f"{name}.txt:{number} is neither a pin nor a hash: {line}")
    return pins
