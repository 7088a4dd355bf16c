"""Peers: other programs for the same job. Each module times one of them at M3's sizes and prints one JSON object.

Except for pytorch.py they run in another Python environment than the project. So no module imports healthgpt_edge, and
each imports only the packages of its own peer.
"""
