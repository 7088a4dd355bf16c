"""Latency and memory, measured against the machine's ceiling. See the README for the commands."""
