"""Benchmarks, each a command: `python -m benchmarks.NAME --help`. They check what they time, and write to `results/`.

    benchmarks              a full-size M3 beside llama.cpp and others, in turn; `peers/` are the others
    benchmarks.full_size    export and run a system of full size: seconds, memory, bytes
    benchmarks.rows         passes of 1 to 64 rows        benchmarks.together   passes of several sequences
    benchmarks.libraries    two builds of the kernels     benchmarks.linears    what adapters add to the base linears
    benchmarks.precisions   what each precision costs in accuracy, on the trained phantom
    benchmarks.drafting     drafts on the trained phantom; `.laws` at the costs of another machine
    gpu.sh                  everything on a GPU, by `gpu/`; benchmarks.cuda_resources: registers, without one

A full-size checkpoint of random weights is written by benchmarks.random_checkpoint.
"""
