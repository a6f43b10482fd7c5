"""``GET /status``: state and traffic of a running relay, without secrets."""
