"""NVFP4, MXFP4 and MXFP8 for qplug: checkpoint formats and the quantizers of their producers."""
