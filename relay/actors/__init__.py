"""The actors of the relay, on threads.

- `relay.actors.readers` reads sockets: of the port for clients, and of each allocation.
- `relay.actors.server` owns the core: all datagrams come to its mailbox, and it alone sends.
- `relay.actors.mailbox` decides in which thread the server actor runs.
- `relay.actors.offload` and `relay.actors.portal` keep the kernel's data path and the portal's channel.
"""
