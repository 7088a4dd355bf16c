"""The original model in plain PyTorch: the judge of every graph and kernel."""
