"""Sockets: UDP with batches, GRO and GSO, and a WebSocket client. This package does not interpret the payload."""
