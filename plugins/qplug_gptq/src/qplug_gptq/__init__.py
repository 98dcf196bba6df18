"""GPTQ for qplug: the checkpoint format of AutoGPTQ and GPTQModel, and kernels for its integer weights."""
