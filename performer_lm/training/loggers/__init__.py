"""Loggers of metrics: the record of the run, always, and those that `logger=` adds."""
