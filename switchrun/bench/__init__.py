"""Measuring and evaluating: child processes that do it, the disk beside them, records that describe themselves."""
