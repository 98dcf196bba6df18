"""FP8 for qplug: the checkpoint formats of five tools, and quantizers by their scale rules."""
