"""The log: what is written, how much of it, and how it looks."""
