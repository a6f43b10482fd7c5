"""What there is to be seen of a running relay: what it is, what it does, and for whom, without a secret."""
