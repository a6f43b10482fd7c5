"""The relay as a sans-IO core: bytes, addresses and a time go in, commands come out.

Nothing here knows a socket, a thread, a clock, a log or the environment, and nothing here imports from outside this
package but the standard library. `relay.core.server` opens with how it works.
"""
