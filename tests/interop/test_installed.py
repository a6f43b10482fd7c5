"""The wheel, installed by pip for each Python of this machine, relays.

`make test-long` makes the environments (`tests/install-for-each-python`).
"""

import contextlib
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.support.program import Program

ENVIRONMENTS: Final = Path(__file__).parents[2] / ".venv" / "pythons"
INSTALLED: Final = sorted(ENVIRONMENTS.glob("*/bin/firezone-relay"))


@pytest.mark.long
@pytest.mark.parametrize("installed", INSTALLED, ids=lambda path: path.parts[-3])
def test_the_probe_of_an_installed_relay_succeeds(installed: Path) -> None:
    with contextlib.closing(Program("--allow-peer", "127.0.0.0/8", command=(str(installed),))) as program:
        program.wait_until_ready()
        credential = program.credential
        probe = [str(installed), "probe", program.host, "--username", credential.username, "--password", credential.password]
        done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done
        assert "Peer path IPv4    ok" in done.stdout
        assert program.stop() == 0
