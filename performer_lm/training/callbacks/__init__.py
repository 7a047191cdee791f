"""Callbacks around the steps of a run, one idea a file.

Lines for people go to the logger `performer_lm`; metrics go to the trainer's loggers.
"""
