"""Checkpoints of FastDeploy (PaddlePaddle): weight-only INT8 and INT4, W4A8, and the convolutional 2-bit code."""
