"""Finds the public addresses of this machine by asking the cloud that it runs in."""
