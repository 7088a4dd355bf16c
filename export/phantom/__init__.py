"""A small HealthGPT trained on synthetic slices, with which accuracy can be measured on any machine."""
