"""Checks and times the CUDA kernels on a GPU: see `benchmarks/gpu.sh`. Needs only PyTorch and the built module."""
