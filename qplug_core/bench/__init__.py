"""Benchmarks: kernels of the installed plugins beside bf16, other libraries, and the limit of the machine, in one run."""
