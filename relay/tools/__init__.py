"""Commands that never run inside a relay: they look at one from outside."""
