"""Kernels of qplug-rocm, one file for each backend and scheme."""
