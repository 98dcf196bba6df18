"""Kernels of qplug-gptq, one file for each backend and scheme."""
