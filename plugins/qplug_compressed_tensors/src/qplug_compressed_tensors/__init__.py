"""compressed-tensors for qplug: the checkpoint format of llm-compressor and of other tools. It has no kernels of its own."""
