"""UDP sockets: opened, read in batches, sent from. Nothing here knows what is in a datagram, or decides on it."""
