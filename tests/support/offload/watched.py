"""Run a relay that checks its program every 0.3 s, with veth as a native driver in `auto`.

Unless the first argument is `reached`, the settings of the program have wrong interfaces. The program then ignores all
packets, as if the driver delivered the packets by an interface below the named interface.
"""

import sys
from collections.abc import Sequence
from typing import Final

from relay.__main__ import main
from relay.actors import offload
from relay.offload import datapath, watch
from relay.offload.devices import NATIVE_DRIVERS, Devices
from relay.offload.layout import Own
from relay.offload.program import Device, XdpProgram

REACHED: Final = "reached"
_INTERVAL: Final = 0.3
_NOBODY: Final = 1 << 30


class _UnreachedProgram(XdpProgram):
    def write_settings(self, own: Sequence[Own], devices: Sequence[Device]) -> None:
        super().write_settings(own, [each._replace(ifindex=each.ifindex + _NOBODY) for each in devices])


if __name__ == "__main__":
    if sys.argv[1] != REACHED:
        datapath.XdpProgram = _UnreachedProgram  # type: ignore[attr-defined]
    watch.INTERVAL = offload.STATE_LIFETIME = _INTERVAL  # type: ignore[misc]
    assert Devices.__init__.__kwdefaults__ is not None
    Devices.__init__.__kwdefaults__["native_drivers"] = NATIVE_DRIVERS | {"veth"}
    del sys.argv[: sys.argv.index("relay")]
    main()
