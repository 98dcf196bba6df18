"""Kernels of qplug-fp4, one file for each backend and scheme."""
