"""A small HealthGPT trained on synthetic slices, so that accuracy means something on any machine."""
