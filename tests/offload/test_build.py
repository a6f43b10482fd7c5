"""Building the package, with a compiler and without."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import hatch_build
from relay.offload import elf
from tests.support.offload.fixtures import CLANG, ROOT, needs_clang

INCOMPLETE = {"CLANG": ""}
"""An environment without a compiler."""
BROKEN = "int"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources for building."""
    copy = tmp_path / "source"
    for name in ("relay", "docs", "deploy"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.o"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    return copy


def run(tree: Path, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def build(tree: Path, kind: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Build as pip does, with the installed hatchling."""
    pytest.importorskip("hatchling", reason="no package is built: hatchling is NOT INSTALLED (pip install '.[test]')")
    return run(tree, "-m", "hatchling", "build", "-t", kind, "-d", "dist", **environment)


def wheel(tree: Path) -> zipfile.ZipFile:
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@needs_clang
def test_a_wheel_has_the_program_and_is_for_any_machine(tree: Path) -> None:
    done = build(tree, "wheel")
    assert done.returncode == 0, done.stderr
    with wheel(tree) as built:
        assert elf.parse(built.read(hatch_build.OBJECT)).license
        assert str(built.filename).endswith("-py3-none-any.whl")


def test_a_wheel_carries_the_pages_and_the_files_for_operators(tree: Path) -> None:
    assert build(tree, "wheel", **INCOMPLETE).returncode == 0
    with wheel(tree) as built:
        carried = {name.partition(".data/data/share/firezone-relay/")[2] for name in built.namelist()}
    assert {"README.md", "docs/operations.md", "deploy/firezone-relay.service", "deploy/prometheus-rules.yml"} <= carried
    assert {"deploy/grafana-dashboard.json", "deploy/kubernetes/relay/daemonset.yaml"} <= carried
    assert {each for each in carried if each.endswith(".py") or "deb" in each.split("/")} == set()


def test_a_wheel_built_without_a_compiler_has_no_program_and_a_warning(tree: Path) -> None:
    (tree / hatch_build.OBJECT).write_bytes(b"of an earlier time")
    done = build(tree, "wheel", **INCOMPLETE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no clang: built without") == 1
    with wheel(tree) as built:
        assert hatch_build.OBJECT not in built.namelist()
        assert "relay/offload/elf.py" in built.namelist()


@needs_clang
def test_a_compile_error_fails_the_build(tree: Path) -> None:
    (tree / hatch_build.SOURCE).write_text(BROKEN)
    done = build(tree, "wheel")
    assert done.returncode != 0
    assert "program.c" in done.stderr
    assert not list((tree / "dist").glob("*"))


def test_a_source_distribution_can_be_compiled(tree: Path) -> None:
    done = build(tree, "sdist")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as built:
        names = {name.partition("/")[2] for name in built.getnames()}
    headers = {f"relay/offload/{each.name}" for each in (tree / "relay/offload").glob("*.h")}
    assert {"hatch_build.py", hatch_build.SOURCE, *headers} <= names
    assert hatch_build.OBJECT not in names


@needs_clang
def test_a_manual_build_compiles_in_place(tree: Path) -> None:
    done = run(tree, "hatch_build.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert elf.parse((tree / hatch_build.OBJECT).read_bytes()).license
    # No other files are left.
    assert [each.name for each in (tree / "relay/offload").glob("*.o")] == ["program.o"]
    assert not [each for each in (tree / "relay/offload").iterdir() if each.is_dir()]


def test_a_manual_build_without_a_compiler_removes_an_old_object(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLANG", raising=False)
    (tree / hatch_build.OBJECT).write_bytes(b"of an earlier time")
    done = run(tree, "hatch_build.py", PATH=os.devnull)
    assert done.returncode == 0
    assert done.stderr.startswith("no clang: built without")
    assert not (tree / hatch_build.OBJECT).exists()


@needs_clang
def test_a_compile_error_keeps_the_old_object(tree: Path) -> None:
    (tree / hatch_build.OBJECT).write_bytes(b"of an earlier time")
    (tree / hatch_build.SOURCE).write_text(BROKEN)
    done = run(tree, "hatch_build.py")
    assert done.returncode == 1
    assert f"can't compile {hatch_build.SOURCE}" in done.stderr
    assert (tree / hatch_build.OBJECT).read_bytes() == b"of an earlier time"


@needs_clang
def test_another_compiler_can_be_configured(tree: Path) -> None:
    other = tree / "clang-of-mine"
    other.symlink_to(str(CLANG))
    done = run(tree, "hatch_build.py", CLANG=str(other), PATH=os.devnull)
    assert done.returncode == 0, done.stderr
    assert (tree / hatch_build.OBJECT).exists()


def test_a_configured_but_missing_compiler_fails_the_build(tree: Path) -> None:
    done = run(tree, "hatch_build.py", CLANG="clang-of-nobody")
    assert (done.returncode, done.stderr) == (1, "CLANG is clang-of-nobody, which does not exist\n")


@needs_clang
def test_the_same_sources_give_the_same_object(tree: Path) -> None:
    run(tree, "hatch_build.py")
    first = (tree / hatch_build.OBJECT).read_bytes()
    run(tree, "hatch_build.py")
    assert (tree / hatch_build.OBJECT).read_bytes() == first
