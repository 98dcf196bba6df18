"""Kernels of qplug-fp8, one file for each backend and scheme."""
