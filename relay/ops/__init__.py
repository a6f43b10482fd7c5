"""Operation of the process: log, metrics, HTTP pages, signals, systemd, and checks of the machine."""
