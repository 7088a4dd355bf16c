"""What people would run instead: each module times one peer at M3's sizes and prints one JSON object.

They run by an interpreter of their own, so they import neither each other's packages nor healthgpt_edge's.
"""
