"""``quant_state``: the JSON beside a 4-bit weight, stored as bytes, and the scales that it tells how to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qplug_core.errors import DecodeError

NESTED = 256
"""Scales that share one scale under double quantization."""

KEYS = ("quant_type", "blocksize", "dtype", "shape")
NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")


@dataclass(frozen=True)
class QuantState:
    """What the JSON says. ``dtype``: what the model computes in, no number of the weight. ``offset``: None without
    double quantization."""

    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    dtype: str = "bfloat16"
    offset: float | None = None

    @classmethod
    def read(cls, stored: Tensor) -> QuantState:
        """The state in ``stored`` uint8 ``[?]``.

        :raises DecodeError: for bytes that are not this JSON.
        """
        try:
            said: dict[str, Any] = json.loads(bytes(stored.tolist()).decode())
            nested = NESTED_KEYS if "nested_offset" in said else ()
            known = said.keys() == {*KEYS, *nested} and said.get("nested_blocksize", NESTED) == NESTED
            n, k = said["shape"]
            offset = float(said["nested_offset"]) if nested else None
            state = cls(str(said["quant_type"]), int(said["blocksize"]), (int(n), int(k)), str(said["dtype"]), offset)
            if not known or state.blocksize < 1:
                raise ValueError(", ".join(f"{key}: {value!r}" for key, value in said.items()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DecodeError(
                f"the quant_state of a layer is not understood ({error}); JSON with {', '.join(KEYS)} and a shape [N, K] was "
                "needed, so save the checkpoint again with bitsandbytes"
            ) from None
        return state

    def write(self) -> Tensor:
        """uint8 ``[?]``, byte for byte as bitsandbytes writes it.

        Double quantization is read only.
        """
        said = {"quant_type": self.quant_type, "blocksize": self.blocksize, "dtype": self.dtype, "shape": list(self.shape)}
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    def check(self, kind: str, n: int, k: int, double: bool) -> None:
        """Refuse the state of another layer; ``n`` may be less than all rows.

        :raises DecodeError: naming what differs.
        """
        rows, columns = self.shape
        for what, found, needed in (
            ("quant_type", self.quant_type, kind),
            ("columns", columns, k),
            ("double quantization", self.offset is not None, double),
        ):
            if found != needed:
                raise DecodeError(
                    f"the quant_state of a layer says {what}: {found!r}; its tensors say {needed!r}, so the file is damaged: fetch it again"
                )
        if rows < n:
            raise DecodeError(
                f"the quant_state says {rows} rows of a layer that has {n}; the file is damaged, so fetch it again"
            )

    def absmax(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scales float32 of the blocks, in the order of arithmetic of bitsandbytes."""
        stored = tensors["weight.absmax"]
        if self.offset is None:
            return stored
        outer = tensors["weight.nested_absmax"].repeat_interleave(NESTED)[: stored.numel()]
        inner = tensors["weight.nested_quant_map"][stored.long()]
        return inner * outer + torch.tensor(self.offset)
