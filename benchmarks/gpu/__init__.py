"""The CUDA kernels on a GPU, checked and timed: `benchmarks/gpu.sh`. Needs PyTorch and the built module alone."""
