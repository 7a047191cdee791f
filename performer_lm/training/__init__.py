"""Fit a model with Lightning."""
