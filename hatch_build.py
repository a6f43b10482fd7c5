"""Compile the kernel program `relay/offload/program.o` and collect the files for operators when this package is built.

This needs clang, or the compiler in CLANG. Without clang the package is built without the program, and can't offload. To
compile in place, run `python hatch_build.py`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = "relay/offload/program.c"
OBJECT = "relay/offload/program.o"
FOR_OPERATORS = ("*.md", "LICENSE", "docs/*.md", "deploy/*.*", "deploy/kubernetes/**/*.*")
"""Files that a wheel installs below share/firezone-relay."""
OPTIONS = ("-target", "bpf", "-mcpu=v3", "-O2", "-ffreestanding", "-Wall", "-Wextra", "-Werror")


class CompileError(Exception):
    """The configured compiler is missing, or rejects the program."""


def find_compiler() -> str | None:
    """Return the path of the compiler, or None without clang or with an empty CLANG.

    Raises:
        CompileError: the compiler in CLANG does not exist.
    """
    named = os.environ.get("CLANG")
    found = shutil.which("clang" if named is None else named)
    if named and found is None:
        raise CompileError(f"CLANG is {named}, which does not exist")
    return found


def compile_program(root: Path) -> bool:
    """Compile the program in place, or remove an old object if there is no compiler.

    Args:
        root: the source tree.

    Returns:
        Whether the object exists now.

    Raises:
        CompileError: compilation failed. An old object is unchanged.
    """
    built = root / OBJECT
    compiler = find_compiler()
    if compiler is None:
        built.unlink(missing_ok=True)
        print(f"no clang: built without {OBJECT}, the sockets will relay all packets", file=sys.stderr)
        return False
    # Replaced atomically, so that a concurrent reader gets a complete file.
    with tempfile.TemporaryDirectory(dir=built.parent) as directory:
        fresh = Path(directory) / built.name
        done = subprocess.run([compiler, *OPTIONS, "-c", str(root / SOURCE), "-o", str(fresh)], check=False)
        if done.returncode:
            raise CompileError(f"{compiler} can't compile {SOURCE}")
        fresh.replace(built)
    return True


def get_build_hook() -> type:
    """Return the build hook for hatchling, importing hatchling only here."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # noqa: PLC0415

    class ProgramBuildHook(BuildHookInterface[Any]):
        """A hook that adds the object to a wheel for any machine, because BPF is independent of the CPU."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            root = Path(self.root)
            if compile_program(root):
                # Hatchling skips files ignored by git.
                build_data["artifacts"].append(f"/{OBJECT}")
            if version != "editable":
                files = [str(path.relative_to(root)) for pattern in FOR_OPERATORS for path in root.glob(pattern)]
                build_data["shared_data"].update({path: f"share/firezone-relay/{path}" for path in files})

    return ProgramBuildHook


if __name__ == "__main__":
    try:
        compile_program(Path(__file__).resolve().parent)
    except CompileError as error:
        sys.exit(str(error))
