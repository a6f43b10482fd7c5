"""HTTP server for the health and the control address."""
