"""Runs the relay that its arguments name, where an interface NAME.TAG is taken for a VLAN of 802.1Q on NAME."""

import contextlib
import re
import socket
import sys
from typing import Final

from relay.__main__ import main
from relay.offload.network import Link
from relay.offload.network_messages import Decoder

_VLAN: Final = re.compile(r"(\w+)\.(\d+)")
_read: Final = Decoder.link


def _link(self: Decoder, message: bytes) -> Link | None:
    found = _read(self, message)
    named = found and _VLAN.fullmatch(found.name)
    if found and named:
        with contextlib.suppress(OSError):
            return found._replace(kind="vlan", parent=socket.if_nametoindex(named[1]), vlan=int(named[2]))
    return found


if __name__ == "__main__":
    Decoder.link = _link  # type: ignore[method-assign]
    del sys.argv[: sys.argv.index("relay")]
    main()
