"""Errors of qplug: one sentence each, saying what was found, what was needed, and what to do."""

from __future__ import annotations


class QplugError(Exception):
    """Anything that qplug refuses to do. The CLI prints it on stderr, without a traceback, and exits with ``exit_code``."""

    exit_code = 4


class UsageError(QplugError):
    """An argument or an option that qplug does not understand."""

    exit_code = 2


class SchemeError(UsageError):
    """A scheme name that does not parse, or a scheme that contradicts itself."""


class DeviceError(UsageError):
    """A device name that does not parse."""


class PluginError(QplugError):
    """A plugin that cannot be used, or two that claim one name."""


class CheckpointError(QplugError):
    """A checkpoint that cannot be read: missing, truncated, or not what its header says."""


class ConfigError(CheckpointError):
    """A quantization config that is contradictory, or changes the numbers in a way nobody here understands."""


class CoverError(CheckpointError):
    """A checkpoint whose tensors are not exactly those that the model and the format need."""


class DecodeError(CheckpointError):
    """Tensors whose values contradict what the config says of them."""


class SplitRequired(QplugError):
    """Weights that cannot become one fused weight without changing a number."""


class NoKernel(QplugError):
    """No kernel takes a layer, and the reference kernel was forbidden."""


class CannotEncode(QplugError):
    """A weight that a format cannot hold without loss."""
