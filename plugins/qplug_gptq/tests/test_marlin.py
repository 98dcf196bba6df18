"""Files packed for Marlin against the original packers: golden words of theirs, and orders written down thread by thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_gptq import tiles
from qplug_gptq.loader import GPTQFormat
from qplug_gptq.marlin import Marlin24Format, MarlinFormat

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

DENSE, SPARSE = MarlinFormat(), Marlin24Format()
MODULE = "model.layers.0.mlp.up_proj"


def checksum(words: torch.Tensor) -> int:
    return sum((w & 0xFFFFFFFF) * i for i, w in enumerate(words.flatten().tolist(), 1)) % 1000003


def quant(name: str, layout: str = "marlin") -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), layout)


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Source:
    infos = MemorySource(tensors or {}).tensors
    return Source(Path("memory"), {"quantization_config": config}, config, "config.json", {}, infos, {})


def pattern(n: int, k: int) -> torch.Tensor:
    return torch.tensor([[(3 * i + 5 * j + i * j // 7) % 16 for j in range(k)] for i in range(n)], dtype=torch.uint8)


def sparse_pattern() -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes ``[64, 32]`` that are nowhere 0, and which two of four are kept."""
    codes = torch.tensor([[(3 * i + 5 * j + i * j // 7) % 15 - 7 for j in range(32)] for i in range(64)], dtype=torch.int8)
    codes[codes == 0] = 7
    first = torch.tensor([[(i + j) % 4 for j in range(8)] for i in range(64)])
    second = (first + 1 + torch.tensor([[(i * j) % 3 for j in range(8)] for i in range(64)])) % 4
    keep = torch.zeros(64, 8, 4, dtype=torch.bool).scatter_(2, torch.stack((first, second), -1), True)
    return codes, keep


def test_words_of_the_original_packer() -> None:
    """Words that IST-DASLab's ``Layer.pack`` gives for one unit of 64 rows by 16 columns."""
    words = tiles.words(pattern(64, 16), 4)
    assert words.shape == (1, 128)
    found = [hex(words[0, i].item() & 0xFFFFFFFF) for i in (0, 1, 2, 3, 64, 127)]
    assert found == ["0xfed59880", "0x3017b8a0", "0x8269d8c0", "0xd5ab08e0", "0xae1948c", "0xff5f1192"]
    assert checksum(words) == 901790
    assert torch.equal(tiles.codes(words, 4), pattern(64, 16))


def test_scales_of_the_original_packer() -> None:
    assert tiles.scale_order(True, False)[:12].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25]
    assert tiles.scale_order(False, False)[:12].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11]
    assert tiles.scale_order(True, True)[:10].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12]


@pytest.mark.parametrize("scheme", ["W4A16_channel", "W4A16_g128"])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (256, 384)])
def test_round_trip_and_cuts(scheme: str, n: int, k: int) -> None:
    weight = random_weight(QuantScheme.parse(scheme), n, k, scale_dtype=torch.float16)
    stored = DENSE.encode(weight, quant(scheme))
    assert stored["B"].shape == (k // 16, 2 * n)
    assert DENSE.decode(stored, quant(scheme), n, k).equal(weight)
    names = MemorySource({f"{MODULE}.{name}": tensor for name, tensor in stored.items()})
    for n0, n1, k0, k1 in [(0, n // 2, 0, k), (0, n, k // 2, k), (7, n - 9, 33, 100)]:
        layer = LayerSpec(MODULE, "linear", n1 - n0, k, columns=(k0, k1))
        cut = decode_part(names, DENSE, quant(scheme), layer, StoredPart(MODULE, n1 - n0, (n0, n1), n))
        assert torch.equal(cut.dequantize(), weight.dequantize()[n0:n1, k0:k1])


def test_one_group_of_the_whole_row_has_the_order_of_channels() -> None:
    """A group as long as the row: the packer permutes its scales as those of a channel, and a cut must not be taken for it."""
    weight = random_weight(QuantScheme.parse("W4A16_g128"), 64, 128)
    stored = DENSE.encode(weight, quant("W4A16_g128"))
    assert torch.equal(stored["s"][0, :8], weight.scales[torch.tensor([0, 1, 8, 9, 16, 17, 24, 25]), 0])


@pytest.mark.parametrize(
    ("scheme", "n", "k"), [("W8A16", 64, 128), ("W4A16_g128_asym", 64, 128), ("W4A16_g32", 64, 128), ("W4A8", 64, 128)]
)
def test_what_readers_of_marlin_do_not_take_is_not_written(scheme: str, n: int, k: int) -> None:
    with pytest.raises(CannotEncode, match="choose the format gptq"):
        DENSE.quant_for_scheme(random_weight(QuantScheme.parse(scheme), n, k))
    with pytest.raises(CannotEncode, match="store this layer as gptq"):
        DENSE.encode(random_weight(QuantScheme.parse("W4A16_channel"), 48, 128), quant("W4A16_channel"))


def test_sparse_words_of_the_original_packer() -> None:
    """B_24 and B_meta that IST-DASLab's packer and CUTLASS's ``reorder_meta`` give for 64 rows by 32 columns."""
    codes, keep = sparse_pattern()
    kept = codes.view(64, 8, 4)[keep].view(64, 16)
    words = tiles.words(kept.view(torch.uint8) + 8, 4, sparse=True)
    assert [hex(words[0, i].item() & 0xFFFFFFFF) for i in (0, 1, 64, 127)] == [
        "0xf3b6cd61",
        "0xfcbe2619",
        "0xbef114a7",
        "0x9aa4abc6",
    ]
    assert checksum(words) == 215178
    stored = {"B_24": words, "B_meta": meta_of(keep), "s": torch.rand(1, 64)}
    assert stored["B_meta"][0, [0, 1, 2, 3, 64, 127]].tolist() == [-12652, -13868, -12652, -8632, -26386, -5812]
    weight = SPARSE.decode(stored, quant("W4A16_channel_2:4", "marlin_24"), 64, 32)
    assert torch.equal(weight.codes, codes * keep.view(64, 32))
    assert weight.scheme.sparsity == "2:4"


def meta_of(keep: torch.Tensor) -> torch.Tensor:
    """``B_meta [K/32, 2*N]`` int16, value by value: CUTLASS's order of the metadata of 2:4 sparse operands."""
    n, columns = keep.shape[0], keep.shape[1] // 4
    flat = [0] * (n * columns)
    for r in range(n):
        for c in range(columns):
            value = 0
            for i in range(4):
                first, second = keep[r, 4 * c + i].nonzero().flatten().tolist()
                value |= (first | second << 2) << (4 * i)
            row, column = r // 64 * 64 + r % 2 * 2 + r % 8 // 4 + r % 4 // 2 * 32 + r % 64 // 8 * 4, c
            if row % 2 == 0 and c % 2 == 1:
                row, column = row + 1, c - 1
            elif row % 2 == 1 and c % 2 == 0:
                row, column = row - 1, c + 1
            flat[column // 2 * n * 2 + row * 2 + column % 2] = value - 65536 if value >= 32768 else value
    return torch.tensor(flat, dtype=torch.int16).view(columns // 2, 2 * n)


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 128), (8, 0), (8, 128)])
def test_sparse_cuts_are_cuts_of_the_whole(bits: int, group: int) -> None:
    n, k = 192, 256
    draw = torch.Generator().manual_seed(bits + group)
    keep = torch.zeros(n, k // 4, 4, dtype=torch.bool)
    keep.scatter_(2, torch.rand(n, k // 4, 4, generator=draw).argsort(-1)[..., :2], True)
    codes = torch.randint(0, 2**bits, (n, k // 2), generator=draw, dtype=torch.uint8)
    scales = torch.rand(n, k // group if group else 1, generator=draw).half()
    stored = {
        f"{MODULE}.B_24": tiles.words(codes, bits, sparse=True),
        f"{MODULE}.B_meta": meta_of(keep),
        f"{MODULE}.s": tiles.stored_scales(scales, sparse=True),
    }
    meant = quant(f"W{bits}A16_{f'g{group}' if group else 'channel'}_2:4", "marlin_24")
    dense = torch.zeros(n, k // 4, 4)
    dense[keep] = codes.flatten().float() - 2 ** (bits - 1)
    expected = dense.view(n, k) * scales.float().repeat_interleave(group or k, 1)
    for n0, n1, k0, k1 in [(0, n, 0, k), (64, 128, 0, k), (0, n, 128, 256), (5, 99, 17, 203)]:
        layer = LayerSpec(MODULE, "linear", n1 - n0, k, columns=(k0, k1))
        cut = decode_part(MemorySource(stored), SPARSE, meant, layer, StoredPart(MODULE, n1 - n0, (n0, n1), n))
        assert torch.equal(cut.dequantize(), expected[n0:n1, k0:k1])


def test_sparse_positions_that_are_none_are_refused() -> None:
    stored = {
        "B_24": torch.zeros(1, 128, dtype=torch.int32),
        "B_meta": torch.zeros(1, 128, dtype=torch.int16),
        "s": torch.ones(1, 64),
    }
    with pytest.raises(DecodeError, match="B_meta"):
        SPARSE.decode(stored, quant("W4A16_channel_2:4", "marlin_24"), 64, 32)


def test_sparse_files_are_never_written() -> None:
    weight = random_weight(QuantScheme.parse("W4A16_channel_2:4"), 64, 128)
    for write in (
        lambda: SPARSE.encode(weight, quant("W4A16_channel_2:4", "marlin_24")),
        lambda: SPARSE.quant_for_scheme(weight),
    ):
        with pytest.raises(CannotEncode, match="store the pruned weights dense, in FP8"):
            write()


@pytest.mark.parametrize(
    ("said", "layout"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "marlin"),
        ({"quant_method": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin_24"}, "marlin_24"),
        ({"quant_method": "gptq_marlin_24"}, "marlin_24"),
        ({"quant_method": "gptq_marlin"}, "gptq"),
        ({"quant_method": "auto_gptq", "checkpoint_format": "gptq_v2"}, "gptq_v2"),
    ],
)
def test_vllm_5080_names_of_kernels_are_no_formats(said: dict[str, Any], layout: str) -> None:
    """Users could not tell gptq, marlin, gptq_marlin and gptq_marlin_24 apart: three name tensors, one a kernel."""
    config = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, **said}
    found = GPTQFormat().parse(source(config)).quant_for(ModuleName((MODULE,)))
    assert found is not None
    assert found.layout == layout
    assert str(found.scheme) == ("W4A16_g128_2:4" if layout == "marlin_24" else "W4A16_g128")


def test_file_that_is_not_what_the_config_calls_it_is_refused() -> None:
    config = {"bits": 4, "group_size": 128, "sym": True, "quant_method": "gptq"}
    packed = {f"{MODULE}.B": torch.zeros(16, 128, dtype=torch.int32), f"{MODULE}.s": torch.zeros(2, 64)}
    with pytest.raises(ConfigError, match="set checkpoint_format to 'marlin'"):
        GPTQFormat().parse(source(config, packed))
    plain = {f"{MODULE}.qweight": torch.zeros(32, 64, dtype=torch.int32)}
    with pytest.raises(ConfigError, match="set checkpoint_format to 'gptq'"):
        GPTQFormat().parse(source({**config, "is_marlin_format": True}, plain))


def test_workspace_of_the_kernel_may_be_left_unread() -> None:
    config = {"bits": 4, "group_size": 128, "quant_method": "gptq", "checkpoint_format": "marlin"}
    assert "workspace" in DENSE.parse(source(config)).ignorable
    assert not GPTQFormat().parse(source({**config, "checkpoint_format": "gptq"})).ignorable
