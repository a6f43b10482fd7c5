"""Stacks of a relay whose interpreter runs no thread."""

import subprocess
import sys

HOLDS_THE_INTERPRETER = """
import ctypes
from relay.ops.dump import write_stacks_after
for seconds in (60, 0.5):
    write_stacks_after(seconds)
# PyDLL keeps the interpreter's lock during the call.
ctypes.PyDLL(None).usleep(900_000)
"""


def test_stacks_are_written_while_c_code_holds_the_interpreter() -> None:
    """A later call replaces the time limit of the former."""
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_INTERPRETER], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.startswith("Timeout (0:00:00.500000)!\n")
    assert 'File "<string>", line 7' in done.stderr
