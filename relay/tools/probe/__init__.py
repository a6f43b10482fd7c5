"""`firezone-relay probe`: tests a TURN server from outside, like a client and its peer."""
