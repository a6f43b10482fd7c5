"""The log: filter, rate limit and format events, and write them to standard error without blocking."""
