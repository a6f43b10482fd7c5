"""Run a relay with an interface NAME.TAG in the role of an 802.1Q VLAN on NAME."""

import contextlib
import re
import socket
import sys
from typing import Final

from relay.__main__ import main
from relay.offload import network
from relay.offload.network import Link, parse_link

_VLAN: Final = re.compile(r"(\w+)\.(\d+)")


def _link(body: bytes) -> Link | None:
    found = parse_link(body)
    named = found and _VLAN.fullmatch(found.name)
    if found and named:
        with contextlib.suppress(OSError):
            return found._replace(parent=socket.if_nametoindex(named[1]), vlan=int(named[2]))
    return found


if __name__ == "__main__":
    network.parse_link = _link
    del sys.argv[: sys.argv.index("relay")]
    main()
