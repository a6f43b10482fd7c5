"""Relaying inside the kernel: what of channel data needs no look at this program's state."""
