"""Data sets read from the hub while a run goes on: nothing of them is stored."""
