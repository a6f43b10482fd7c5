"""Metrics: a table of definitions, exported in the format of Prometheus and over OTLP."""
