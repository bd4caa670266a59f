"""The sections of `benchmarks/gpu.py`, one file each: a question about one GPU, and its checks."""
