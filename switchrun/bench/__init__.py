"""Workloads and measurements: synthetic checkpoints of real geometries."""
