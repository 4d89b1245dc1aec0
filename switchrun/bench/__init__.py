"""Measuring: workloads, the processes that run them, statistics, and records that describe themselves."""
