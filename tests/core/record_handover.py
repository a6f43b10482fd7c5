"""Write the state of a relay to a file, for each released version: ``python -m tests.core.record_handover FILE``."""

import json
import sys
from pathlib import Path

from relay.core.addresses import PeerAddress
from tests.core.test_handover import DUAL, OTHER
from tests.support.core import CHANNEL, PEER, PEER6, Client, relay_with

relay = relay_with()
first = Client(relay)
first.allocate()
first.refresh(3600)
first.bind_channel(CHANNEL)
first.bind_channel(CHANNEL + 1, PeerAddress((PEER[0], 1)))
relay.pass_time(400)
first.bind_channel(CHANNEL)
# The second channel is in its grace period now.
relay.pass_time(250)
second = Client(relay, OTHER, salt="other")
second.allocate(DUAL)
second.bind_channel(peer=PEER6)
gone = Client(relay, ("203.0.113.78", 1), salt="gone")
gone.allocate()
gone.refresh(0)
first.send_on_channel(b"data")
second.send_on_channel(b"early", CHANNEL + 5)
Path(sys.argv[1]).write_text(json.dumps([relay.begin_handover(), relay.server.handover.rest()]) + "\n")
