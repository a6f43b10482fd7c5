"""Relaying of ChannelData in the kernel, by an XDP program."""
