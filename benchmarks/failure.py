"""What goes wrong in a measurement without being a fault of the suite."""


class FailedError(Exception):
    """A measurement gave nothing: a server ended, lost everything, or refused. The message is one line that says why."""
