"""Kernels of qplug-int8, one file for each backend and scheme."""
