"""INT8 for qplug: the smallest complete plugin, with a format, two quantizers and kernels."""
