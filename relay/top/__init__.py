"""``firezone-relay top``: a live view of a relay, on a terminal.

It knows a relay by the answer to ``GET /status`` only, and imports nothing of it but what that answer is.
"""
