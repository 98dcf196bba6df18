"""``qplug tune`` on tiles, with the interpreter in place of a GPU and a clock that prefers what the test says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from qplug_core.bench.contender import Contender
from qplug_core.bench.tune_tiles import tune_tiles
from qplug_core.decl import API, OPTIMIZED, KernelDecl
from qplug_core.device import Device
from qplug_core.kernel import Problem
from qplug_core.kernels import triton_tables
from qplug_core.kernels.triton_tables import Asked, Tile, tile_for, tiles
from qplug_core.kernels.triton_weight_only import TritonWeightOnly
from qplug_core.registry import Entry, PluginRow, Registry
from qplug_core.resolve import Policy, Resolver
from qplug_core.scheme import QuantScheme
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.tuning import Tuning

need_interpreter()

GPU = Device.from_name("sm_80")
PROBLEM = Problem("linear", QuantScheme.parse("W4A16_g32"), 48, 256, "float16")


class W4A16(TritonWeightOnly):
    name = "test.triton_w4a16"
    numbers = ("int4",)


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tables, "_tuned", {})
    monkeypatch.setattr("qplug_core.bench.tune_tiles.beyond_cache", lambda device: 0)


def registry() -> Registry:
    made = Registry([PluginRow("test", "dist-test", "1.0", API, "ready")])
    decl = KernelDecl(
        W4A16.name, f"{__name__}:W4A16", ("linear",), ("W4A16 g*",), ("sm_80+",), rank=OPTIMIZED, dtypes=("float16",),
        requires=("triton>=3.6",),
    )  # fmt: skip
    made.kernels.append(Entry(decl, made.plugins[0]))
    return made


def clock(wanted: Tile) -> object:
    """Seconds: the wanted tile is twice as fast as any other. Every tile must also run."""

    def seconds(contender: Contender, x: Tensor) -> float:
        contender.calls[0](x)
        return 1.0 if triton_tables._forced == wanted else 2.0

    return seconds


def test_the_fastest_tile_is_found_written_read_and_used(tmp_path: Path) -> None:
    wanted = replace(tiles("weight_only", "sm_80", 4)[1], splits=2)
    found, notes = tune_tiles(registry(), [PROBLEM], [5], GPU, clock(wanted), where="cpu")  # type: ignore[arg-type]
    asked = Asked("weight_only", "sm_80", 4, 5, 48, 256, "int")
    assert (found, notes) == ({asked: wanted}, [])
    assert tile_for("weight_only", "sm_80", 4, 5, 48, 256, kind="int") == wanted
    path = tmp_path / "t.json"
    Tuning(GPU.name, GPU.arch, {"dist-test": "1.0"}, {}, tiles=found).write(path)
    read = Tuning.read(path)
    assert read.tiles == found
    triton_tables._tuned.clear()
    assert tile_for("weight_only", "sm_80", 4, 5, 48, 256, kind="int") != wanted
    Resolver(registry(), GPU, Policy(), read).kernel(W4A16.name)
    assert tile_for("weight_only", "sm_80", 4, 5, 48, 256, kind="int") == wanted


def test_a_tile_with_another_product_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tiles("weight_only", "sm_80", 4)[1]
    stock = W4A16.apply

    def broken(self: W4A16, x: Tensor, packed: object, bias: Tensor | None = None) -> Tensor:
        forced = triton_tables._forced
        y = stock(self, x, packed, bias)  # type: ignore[arg-type]
        return y * 1.1 if forced is not None and forced.sizes == wrong.sizes else y

    monkeypatch.setattr(W4A16, "apply", broken)
    found, notes = tune_tiles(registry(), [PROBLEM], [5], GPU, clock(wrong), where="cpu")  # type: ignore[arg-type]
    (tile,) = found.values()
    assert tile.sizes != wrong.sizes
    assert "another product" in notes[0]


def test_a_weight_that_is_written_out_has_no_tile_to_choose() -> None:
    assert tune_tiles(registry(), [PROBLEM], [129], GPU, lambda contender, x: 1.0, where="cpu") == ({}, [])


def test_tiles_of_an_older_file_stay_where_they_were_not_measured_again() -> None:
    first, second = (Asked("mixed", "sm_80", 4, m, 64, 64) for m in (1, 8))
    old, new = Tile.of({"BN": 64, "BM": 16, "num_warps": 4}), Tile.of({"BN": 64, "BM": 64, "num_warps": 4}, 2)
    tuning = Tuning(GPU.name, GPU.arch, {}, {}, tiles={first: old, second: old})
    assert replace(tuning, tiles={second: new}).merged(tuning).tiles == {first: old, second: new}
