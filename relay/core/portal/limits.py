"""The constants of the portal protocol, with their reasons. Times are in seconds."""

ATTEMPT_TIMEOUT = 15
"""Limit of one attempt to connect, from the name look-up to the answer to the upgrade. The time suffices for a slow look-up
and a slow TLS handshake."""

JOIN_TIMEOUT = 5
"""Limit of the answer to a join. A healthy portal answers at once; a new connection may reach another node."""

INIT_TIMEOUT = 30
"""Time between the first join and a warning that `init` is missing. The relay does not reconnect: the portal decides."""

HEARTBEAT_INTERVAL = 10
"""Interval of heartbeats. NAT entries expire after about 30 s."""

SILENCE_LIMIT = 40
"""Limit of the time since the upgrade, or since the relay sent the last heartbeat that was answered. The fourth heartbeat
after it is then due. Portals close a connection on which they received nothing for 41 s, and tell clients to drop the relay
1 s later. They received the answered heartbeat after it was sent, so the relay has at least 1 s to 2 s to join again."""

FIRST_RETRY_INTERVAL = 1
"""Interval of attempts before the first join. An operator may be watching; a starting portal takes seconds."""

FIRST_RETRY_LIMIT = 15
"""Limit of the first join. A wrong URL or a closed firewall should be reported, not retried for a day."""

BACKOFF_START = 0.125
"""Delay of the first reconnect. Most losses are replacements of a portal node, and clients drop a relay that the portal has
missed for 1 s. Round trips for TCP, TLS, upgrade and join fit in this second too, and so does a second attempt."""

BACKOFF_FACTOR = 2
"""Growth of each interval over the previous interval."""

LASTING_JOIN = 0.5
"""Time after which the loss of a join is no failure, so that the intervals start again. A portal that crashes on each join
crashes earlier, and is joined at growing intervals. In the long run there are never more than two joins per second."""

BACKOFF_CAP = 30
"""The longest interval. The portal does not offer a disconnected relay, so this interval bounds the time until the relay is
in use again. The last minute before RETRY_LIMIT always contains an attempt."""

JITTER_PERCENT = 50
"""Maximum random reduction of an interval, so that the relays of a lost portal do not reconnect simultaneously."""

RETRY_LIMIT = 24 * 3600
"""Time without a join before the relay gives up. By then nearly all credentials for this relay have expired."""

RETRY_AFTER_CAP = 3600
"""The longest accepted Retry-After. A wrong number must not keep a relay away for a year."""

LEAVE_TIMEOUT = 1
"""Limit of the portal's confirmation of a leave. The limit delays the end of the process."""

CLOSE_TIMEOUT = 1
"""Limit of the portal's answer to a close frame. The limit delays the end of the process too."""

FRAMES_PER_HEARTBEAT = 100
"""Maximum of frames of any kind in one heartbeat interval. More end the connection. The portal sends one frame for each
heartbeat, and `init`. Parsing the largest frame takes 2 ms, during which no packet is relayed."""

LOGS_PER_CONNECTION = 10
"""Maximum of log entries about protocol errors on one connection. Further errors are only counted."""

QUOTED_CHARACTERS = 200
"""Maximum characters of a text from the portal in the log."""
