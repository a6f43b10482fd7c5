"""Sockets: UDP in batches and trains, and one WebSocket. Nothing here knows what comes by them, or decides on it."""
