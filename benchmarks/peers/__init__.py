"""Peers: other programs for the same job. Each module times one of them at M3's sizes and prints one JSON object.

Peers run in an environment of their own, so they share no packages with each other or, except for pytorch.py, with
healthgpt_edge.
"""
