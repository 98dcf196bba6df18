"""torchao checkpoints for qplug: the safetensors form of its tensor classes."""
