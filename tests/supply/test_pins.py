"""The lock files contain all declared packages with their dependencies, and no other packages."""

import re
import tomllib
from collections import deque
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from supply.pins import FOLDER, LINUX, Pin, read

LOCKS: Final = sorted(path.stem for path in FOLDER.glob("*.txt"))
ADVICE: Final = "run `make lock`"


def declared() -> dict[str, list[Requirement]]:
    """Return the requirements in pyproject.toml, by lock file."""
    settings: dict[str, Any] = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    runtime = settings["project"]["dependencies"]
    extras = settings["project"]["optional-dependencies"]
    build = settings["dependency-groups"]["build"]
    wanted = {
        "relay": runtime,
        "otlp": [*runtime, *extras["otlp"]],
        "build": build,
        "all": [*runtime, *build, *extras["test"], *extras["lint"], *extras["supply"]],
    }
    return {name: [Requirement(each) for each in requirements] for name, requirements in wanted.items()}


def pinned(lock: str) -> dict[str, Pin]:
    return {pin.name: pin for pin in read(lock) if pin.is_for_linux}


def requirements_of(name: str, extras: Iterable[str]) -> list[Requirement]:
    """Return the requirements of an installed package, with some of its extras."""
    found = map(Requirement, metadata.requires(name) or ())
    return [
        each
        for each in found
        if any(each.marker is None or each.marker.evaluate(LINUX | {"extra": extra}) for extra in extras)
    ]


@pytest.mark.parametrize("lock", ["relay", "otlp", "build", "all"])
def test_a_lock_has_the_declared_packages_and_their_dependencies_only(lock: str) -> None:
    pins = pinned(lock)
    needed: set[str] = set()
    waiting = deque(declared()[lock])
    while waiting:
        wanted = waiting.popleft()
        name = canonicalize_name(wanted.name)
        assert name in pins, f"{wanted} is not locked in {lock}.txt: {ADVICE}"
        assert wanted.specifier.contains(pins[name].version, prereleases=True), (
            f"{wanted} is not {pins[name].version}: {ADVICE}"
        )
        key = f"{name}[{','.join(sorted(wanted.extras))}]"
        if key not in needed:
            needed.add(key)
            waiting += requirements_of(name, {"", *wanted.extras})
    assert {each.partition("[")[0] for each in needed} == set(pins), ADVICE


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes_and_no_line_has_an_address(lock: str) -> None:
    """`read` accepts only pins, hashes and comments."""
    pins = read(lock)
    assert pins
    assert [pin.name for pin in pins if not pin.hashes] == []
    comments = [line for line in (FOLDER / f"{lock}.txt").read_text().splitlines() if line.lstrip().startswith("#")]
    assert [line for line in comments if "://" in line] == []


def test_one_package_has_one_version_in_all_locks() -> None:
    versions: dict[str, set[str]] = {}
    for lock in LOCKS:
        for pin in read(lock):
            versions.setdefault(pin.name, set()).add(pin.version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_the_installed_versions_are_the_locked_versions() -> None:
    """The tests run with the shipped packages."""
    pins = pinned("all")
    assert {name: metadata.version(name) for name in pins} == {name: pin.version for name, pin in pins.items()}


@pytest.mark.parametrize(
    "line", ["https://packages.example/x.whl", "--index-url https://packages.example", "click", "click>=8", "-r other.txt"]
)
def test_a_lock_with_another_line_is_rejected(tmp_path: Path, line: str) -> None:
    (tmp_path / "lock.txt").write_text(f"# comment\nclick==8.5.1 \\\n    --hash=sha256:{'0' * 64}\n{line}\n")
    with pytest.raises(ValueError, match=r"lock\.txt:4 is neither"):
        read("lock", tmp_path)


def test_the_build_requires_only_locked_packages() -> None:
    settings = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    assert set(settings["build-system"]["requires"]) <= set(settings["dependency-groups"]["build"])


@pytest.mark.parametrize("name", ["Makefile", "Dockerfile", "README.md", "deploy/deb/build"])
def test_all_installations_require_hashes(name: str) -> None:
    text = (FOLDER.parent / name).read_text()
    installs = re.findall(r"pip(?!x)\S*(?: --?\S+| /\S+)*? install .*", text)
    assert installs
    assert [each for each in installs if "--require-hashes" not in each and "--no-index" not in each] == []


def test_no_file_names_a_package_index() -> None:
    """The package index is a setting of each machine, often a mirror."""
    hosts = ("pypi" + ".org", "python" + "hosted.org")
    folders = ("relay", "tests", "docs", "deploy", "supply", "requirements", "benchmarks")
    files = [path for folder in folders for path in (FOLDER.parent / folder).rglob("*") if path.is_file()]
    files += [path for path in FOLDER.parent.iterdir() if path.is_file()]
    texts = ((path, path.read_bytes()) for path in files if "__pycache__" not in path.parts)
    assert [str(path) for path, text in texts if any(host.encode() in text for host in hosts)] == []
