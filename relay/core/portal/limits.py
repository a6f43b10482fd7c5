"""The portal protocol in numbers, and why each is what it is. Times are in seconds."""

ATTEMPT_TIMEOUT = 15
"""For one attempt to connect, from looking up the name to the answer to the upgrade. Two addresses of which the first one is
a black hole, and a slow TLS handshake, fit."""

JOIN_TIMEOUT = 5
"""For the answer to a join. The portal answers at once or has lost its mind; a new connection may reach another node."""

INIT_PATIENCE = 30
"""After the first join before the log says that `init` is missing. No reason to reconnect: the gate is the portal's."""

HEARTBEAT_INTERVAL = 10
"""Between heartbeats. Phoenix closes a channel that was silent for 60 s, and idle NAT entries go after 30 s or so."""

UNANSWERED_HEARTBEATS = 3
"""That many may wait for their answers when the next is due; with one more the connection is given up: that is 50 s after
the last answer (or the upgrade), and before the portal itself gives up at 60 s."""

FIRST_RETRY_INTERVAL = 1
"""Between attempts before the first join. Someone is likely to watch the start; a portal that starts too takes seconds."""

FIRST_RETRY_LIMIT = 15
"""Within which the first join has to be answered: a wrong URL or a closed firewall should be told, not retried for a day."""

BACKOFF_START = 1
"""Before the first attempt to reconnect: most losses are a node of the portal that was replaced."""

BACKOFF_FACTOR = 2
"""By which each interval is longer than the last."""

BACKOFF_CAP = 30
"""The longest interval. A relay that the portal misses is one it does not hand out, so this is how long it may take to be
back in use; and the last minute before RETRY_LIMIT always has an attempt in it."""

JITTER_PERCENT = 50
"""By up to which share an interval is shortened at random, so that relays that lost one portal don't come back at once."""

RETRY_LIMIT = 24 * 3600
"""Without a join before the relay gives up. No credential for it outlives that by much, so that it would relay nothing."""

RETRY_AFTER_CAP = 3600
"""The longest wait that a portal can ask for with Retry-After: a wrong number must not keep a relay away for a year."""

LEAVE_TIMEOUT = 1
"""For the portal to confirm that the channel is left. Whoever waits for the process to end waits for this too."""

CLOSE_TIMEOUT = 1
"""For the portal to answer a close frame, likewise."""

FRAMES_PER_HEARTBEAT = 100
"""Frames of any kind in one heartbeat interval, beyond which the connection is given up. A relay is sent one for each
heartbeat, and `init`; the largest take 2 ms to read, during which no packet is relayed."""

NOTES_PER_CONNECTION = 10
"""Lines that a portal can make a relay log about oddities on one connection; further ones are only counted."""

QUOTED_CHARACTERS = 200
"""Of a text of the portal's that is shown in the log."""
