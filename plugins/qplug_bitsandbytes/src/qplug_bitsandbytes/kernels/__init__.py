"""Kernels of qplug-bitsandbytes, one file for each backend and scheme."""
