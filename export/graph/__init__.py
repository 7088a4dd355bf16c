"""The static graphs of a bundle, each built node by node from a checkpoint."""
