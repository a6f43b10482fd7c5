"""The relay as actors on threads: what arrives on a socket is put to the core, and its commands are carried out.

- `relay.actors.system` starts everything in order, hears of failures, and stops everything in reverse order.
- `relay.actors.listener` reads the port that clients talk to.
- `relay.actors.server` owns the core: all that arrives comes to its inbox, and it alone sends.
- `relay.actors.allocation` reads the sockets of one allocation.
"""
