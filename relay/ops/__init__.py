"""What people see of a running relay: its log, its health pages, and what all threads do."""
