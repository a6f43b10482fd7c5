"""What people see of a running relay: its log, pages, metrics, and what all threads do; and what its machine lets it do."""
