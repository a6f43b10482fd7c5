"""`firezone-relay probe`: tries out a TURN relay from the outside, as a client and its peer would use it."""
