"""Experts that are not modules: slots in memory, threads that fill them, and a cache that decides who stays."""
