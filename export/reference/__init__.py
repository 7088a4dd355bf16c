"""The original model in plain PyTorch, the reference for every graph and kernel."""
