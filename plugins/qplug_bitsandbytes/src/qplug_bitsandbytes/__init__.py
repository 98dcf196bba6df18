"""bitsandbytes checkpoints for qplug: NF4 and FP4 with or without double quantization, and LLM.int8."""
