"""Kernels of qplug-awq, one file for each backend and scheme."""
