"""The error of the benchmarks."""


class MeasurementError(Exception):
    """A failure: a server ended, lost all packets, or rejected a request, or a tool is missing. The message is one line."""
