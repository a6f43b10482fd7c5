"""Features of this machine, and marks for tests with requirements."""

import os
import shutil
import socket
import subprocess
import sys
from typing import Final

import pytest


def has_ipv6() -> bool:
    """Return whether IPv6 works over loopback."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


HAS_IPV6 = has_ipv6()


# Containers often have no IPv6.
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")


NOBODY: Final = 65534


AS_NOBODY: Final = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"),
)


def works(*command: str) -> bool:
    """Return whether a command succeeds on this machine."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can tell what happens to root")


needs_nobody = pytest.mark.skipif(
    not works(*AS_NOBODY, sys.executable, "-c", "import relay.cli"), reason="this tree can't be run as another user"
)
