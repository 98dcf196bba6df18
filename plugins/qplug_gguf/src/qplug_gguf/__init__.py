"""GGUF checkpoints: what llama.cpp writes, as weights of the hub."""
