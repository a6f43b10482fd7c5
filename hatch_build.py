"""Compiles the program that relays inside the kernel, when this package is built: `relay/offload/program.o`.

That takes clang, or the compiler that CLANG names. Without it the package is built all the same, and relays as it does where
the kernel won't have the program. Run by hand (`python hatch_build.py`), this compiles in place.
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
OPTIONS = ("-target", "bpf", "-mcpu=v3", "-O2", "-ffreestanding", "-Wall", "-Wextra", "-Werror")


class CompileError(Exception):
    """The compiler that was asked for isn't there, or doesn't take the program."""


def find_compiler() -> str | None:
    """Tell where the compiler is; None if there is no clang, or CLANG is empty.

    Raises:
        CompileError: there is none of the name that CLANG has.
    """
    named = os.environ.get("CLANG")
    found = shutil.which("clang" if named is None else named)
    if named and found is None:
        raise CompileError(f"CLANG is {named}, which isn't there")
    return found


def compile_program(root: Path) -> bool:
    """Compile the program in place, or remove what is left of an earlier time if there is no compiler.

    Args:
        root: where the source tree is.

    Returns:
        Whether there is an object now.

    Raises:
        CompileError: see there; an object of an earlier time is left as it was.
    """
    built = root / OBJECT
    compiler = find_compiler()
    if compiler is None:
        built.unlink(missing_ok=True)
        print(f"no clang: built without {OBJECT}, all packets will be relayed by Python", file=sys.stderr)
        return False
    # Put there in one step: whoever reads it meanwhile gets the one or the other.
    with tempfile.TemporaryDirectory(dir=built.parent) as directory:
        fresh = Path(directory) / built.name
        done = subprocess.run([compiler, *OPTIONS, "-c", str(root / SOURCE), "-o", str(fresh)], check=False)
        if done.returncode:
            raise CompileError(f"{compiler} has failed on {SOURCE}")
        fresh.replace(built)
    return True


def get_build_hook() -> type:
    """Tell hatchling what to run; only that has what this imports."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # noqa: PLC0415

    class ProgramBuildHook(BuildHookInterface[Any]):
        """Adds the object to a wheel, whose tag still says any machine: it is the kernel that runs it."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's
            if compile_program(Path(self.root)):
                # As git ignores it, it wouldn't be taken otherwise.
                build_data["artifacts"].append(f"/{OBJECT}")

    return ProgramBuildHook


if __name__ == "__main__":
    try:
        compile_program(Path(__file__).resolve().parent)
    except CompileError as error:
        sys.exit(str(error))
