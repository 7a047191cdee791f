"""Attention backends: one file each, one contract (`base.py`)."""
