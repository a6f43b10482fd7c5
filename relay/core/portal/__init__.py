"""The relay's side of the portal's channel, without IO: events of a connection and a time in, commands out.

`channel` has the states and `connection` the counters of each connection. `events` are the inputs, `commands` the outputs.
`frames` reads and writes text frames. `endpoint` has the portal's URL and the relay's description. `retry` and `reasons`
decide after failures. `limits` has all numbers.
"""
