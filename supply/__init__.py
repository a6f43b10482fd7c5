"""What the relay is made of: locked, audited, and listed."""
