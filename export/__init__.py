"""Turn a released HealthGPT checkpoint into a bundle of static graphs."""
