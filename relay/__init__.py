"""A STUN/TURN relay for Firezone networks.

Follow a packet: it comes in through ``relay.actors`` (on a socket of ``relay.net``), is decided on in ``relay.core``,
and goes out through ``relay.actors`` again.
"""

__version__ = "0.1.0"
