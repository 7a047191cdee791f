"""Where a run's metrics go: its own record, always, and whatever `logger=` adds."""
