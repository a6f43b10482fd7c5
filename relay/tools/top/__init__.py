"""`firezone-relay top`: a live view of a relay in a terminal."""
