"""Zero points of GPTQ files: what the stored words mean, and the evidence that a config is wrong about it.

Layout ``gptq`` (v1) stores z - 1, ``gptq_v2`` and ``gptq_p`` store z, and configs are wrong about which. Two facts are proof:

* A symmetric layer has z = 2**(b-1) everywhere, so its words are one constant in v1 and another in v2.
* No asymmetric quantizer gives one zero point to every group of a layer, so a layer that holds one of these two constants
  in at least :data:`EVIDENCE` places is symmetric, whatever the config calls it.

A v1 field of all ones is z = 0 (no quantizer makes 2**b: its range includes 0), but writers disagree about the other
fields of that word: GPTQModel and auto-round subtract from whole words, so that a borrow runs into the next field, others
field by field, and AutoGPTQ fills the higher fields with ones. Only whole words can be undone without knowing more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core.errors import DecodeError
from qplug_core.packing import unpack
from qplug_core.scheme import TensorQuant

from . import planar

EVIDENCE = 128
"""Zero points that must agree before a layer counts as symmetric though the config does not say so: with fewer, chance could."""

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""Words with 1 in every field, of the widths that do not straddle words."""


def unpack_codes(words: Tensor, bits: int, layout: str) -> Tensor:
    """uint8 codes ``[R, L]`` of int32 words, contiguous, in the packing of ``layout``."""
    return planar.unpack(words, bits) if layout == "gptq_p" else unpack(words, bits)


def check_symmetric(qzeros: Tensor, part: TensorQuant, layout: str, said: bool) -> None:
    """Refuse zero points that a symmetric layer does not have.

    ``qzeros`` ``[G, N*b/32]`` int32. ``said``: the config names the layout; where it does not, either constant is right.

    :raises DecodeError: naming the key to correct.
    """
    stored = unpack_codes(qzeros.contiguous(), part.bits, layout)
    middle = 2 ** (part.bits - 1)
    mine, other = (middle - 1, middle) if layout == "gptq" else (middle, middle - 1)
    if bool((stored == mine).all()) or (not said and bool((stored == other).all())):
        return
    if bool((stored == other).all()):
        raise DecodeError(_wrong_version("a symmetric layer", other, mine, layout))
    raise DecodeError(
        f"stored zero points from {int(stored.min())} to {int(stored.max())} were found in a layer that the config calls "
        f"symmetric, which has {mine} everywhere; set sym to false in the quantization config"
    )


def asymmetric(qzeros: Tensor, bits: int, layout: str, said: bool, whole_words: bool) -> Tensor:
    """Zero points ``[G, N]`` int16 of stored words ``[G, N*b/32]`` int32.

    ``said``: as in :func:`check_symmetric`. ``whole_words``: the producer subtracts 1 from whole words.

    :raises DecodeError: where the layer proves that the config names the wrong layout, or cannot be read with certainty.
    """
    words = qzeros.contiguous()
    stored = unpack_codes(words, bits, layout)
    middle = 2 ** (bits - 1)
    offset = 1 if layout == "gptq" else 0
    other = middle if offset else middle - 1
    # With 2 bits, zero point 1 everywhere is what a skewed layer has: v2 is believed there.
    proof = stored.numel() >= EVIDENCE and (bits > 2 or offset == 1)
    if proof and bool((stored == other).all()):
        if said:
            raise DecodeError(_wrong_version("a layer", other, middle - offset, layout))
        offset = 1 - offset
    if not offset:
        return stored.to(torch.int16)
    if not bool((stored == 2**bits - 1).any()):
        return stored.to(torch.int16).add_(1)
    if whole_words and bits in ONES:
        return unpack(words + ONES[bits], bits).to(torch.int16)
    raise DecodeError(
        f"zero points stored as {2**bits - 1} were found, which is zero point 0 of a file that stores them minus one, and "
        "writers disagree about the fields beside it; ask for the checkpoint as gptq_v2, or convert it with the tool that "
        "wrote it"
    )


def _wrong_version(what: str, found: int, needed: int, layout: str) -> str:
    right = {"gptq": "gptq_v2", "gptq_v2": "gptq"}.get(layout)
    packing = "auto_round:gptqmodel" if right == "gptq_v2" else "auto_round:auto_gptq"
    remedy = (
        f"set checkpoint_format to {right!r} in the quantization config (packing_format to {packing!r} in auto-round's)"
        if right
        else "convert the file with GPTQModel"
    )
    return (
        f"every stored zero point of {what} is {found}, where {layout} has {needed} for symmetric weights, which is how the "
        f"other convention stores them; {remedy}"
    )
