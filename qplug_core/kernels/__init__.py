"""Kernels in C for CPUs, and the toolkit that plugins compose theirs from."""
