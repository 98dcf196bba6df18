"""AWQ for qplug: the checkpoint format of AutoAWQ, GPTQModel and llm-awq, and a kernel for its integer weights."""
