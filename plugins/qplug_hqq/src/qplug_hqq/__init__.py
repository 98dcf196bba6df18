"""HQQ for qplug: half-quadratic quantization, with zero points that are no integers."""
