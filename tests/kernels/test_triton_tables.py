"""Tiles: what the tables say for a shape and a device, and tiles that were measured here. Needs no Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qplug_core.device import Device
from qplug_core.kernels import triton_tables
from qplug_core.kernels.triton_tables import Asked, Tile, idle, shared_of, tile_for, tiles, use, watched
from qplug_core.testing.compile_cells import TARGETS

LARGE = {"processors": 132, "shared": 227 * 1024}


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tables, "_tuned", {})


def test_many_tokens_take_the_largest_tile_where_it_fills_the_processors() -> None:
    tile = tile_for("scaled", "sm_90", 8, 4096, 4096, 4096, **LARGE)
    assert (tile["BN"], tile["BM"]) == (128, 128)


def test_a_shape_that_would_leave_half_of_the_processors_idle_takes_a_smaller_tile() -> None:
    few, many = (tile_for("scaled", "sm_90", 8, 128, 1024, 256, processors=p) for p in (4, 132))
    assert (few["BN"], few["BM"]) == (128, 128)
    assert idle(few, 128, 1024, 256, 132)
    assert many["BM"] < few["BM"]
    # A long K is split instead.
    assert tile_for("scaled", "sm_90", 8, 128, 1024, 8192, processors=132) == few


def test_a_tile_that_does_not_fit_into_shared_memory_is_passed_over() -> None:
    large = tile_for("scaled", "sm_90", 8, 4096, 4096, 4096, shared=227 * 1024)
    small = tile_for("scaled", "sm_90", 8, 4096, 4096, 4096, shared=64 * 1024)
    assert shared_of("scaled", 8, small) < shared_of("scaled", 8, large)
    assert small in tiles("scaled", "sm_90", 8)


def test_every_target_takes_its_own_rows_for_many_tokens() -> None:
    """What the compile matrix found to fit is not passed over by the estimate."""
    for target in TARGETS:
        shared = Device.from_name(target).shared_memory
        for family, bits, tokens in (("weight_only", 4, 128), ("scaled", 8, 4096), ("mixed", 4, 4096), ("sparse", 8, 4096)):
            assert tile_for(family, target, bits, tokens, 8192, 8192, shared=shared) == tile_for(
                family, target, bits, tokens, 8192, 8192
            )


def test_tables_of_16_values_have_tiles_of_their_own_where_registers_spilled() -> None:
    plain, table = (tile_for("weight_only", "sm_100", 4, 64, 4096, 4096, kind=kind) for kind in ("int", "table"))
    assert dict(plain.options)["num_warps"] == 4
    assert dict(table.options)["num_warps"] == 8


def test_a_measured_tile_decides_for_its_shape_and_no_other() -> None:
    other = tiles("scaled", "sm_90", 8)[0]
    measured = Tile(other.sizes, other.options, splits=4)
    use([(Asked("scaled", "sm_90", 8, 512, 4096, 4096), measured)])
    assert tile_for("scaled", "sm_90", 8, 300, 4096, 4096, **LARGE) == measured
    for tokens, n, arch in ((513, 4096, "sm_90"), (300, 8192, "sm_90"), (300, 4096, "sm_100")):
        assert tile_for("scaled", arch, 8, tokens, n, 4096, **LARGE) != measured


def test_of_two_measured_numbers_of_tokens_the_next_larger_decides() -> None:
    first, second = (Tile(t.sizes, t.options, splits=2) for t in tiles("scaled", "sm_90", 8)[:2])
    use([(Asked("scaled", "sm_90", 8, 16, 64, 64), second), (Asked("scaled", "sm_90", 8, 12, 64, 64), first)])
    assert tile_for("scaled", "sm_90", 8, 12, 64, 64) == first
    assert tile_for("scaled", "sm_90", 8, 13, 64, 64) == second


def test_what_was_measured_with_many_tokens_says_nothing_of_a_few() -> None:
    measured = replace(tiles("scaled", "sm_90", 8)[-1], splits=3)
    use([(Asked("scaled", "sm_90", 8, 512, 64, 64), measured)])
    assert tile_for("scaled", "sm_90", 8, 257, 64, 64) == measured
    assert tile_for("scaled", "sm_90", 8, 256, 64, 64) != measured


def test_a_tile_that_the_matrix_never_compiled_is_not_used() -> None:
    use([(Asked("scaled", "sm_90", 8, 512, 64, 64), Tile.of({"BN": 256, "BM": 256, "BK": 64, "num_warps": 16}))])
    assert tile_for("scaled", "sm_90", 8, 8, 64, 64) in tiles("scaled", "sm_90", 8)


def test_watching_sees_what_is_asked_and_answers_with_the_forced_tile() -> None:
    forced = Tile.of({"BN": 1, "BM": 1})
    with watched(forced) as asked:
        assert tile_for("mixed", "sm_90", 4, 8, 64, 64) == forced
    assert asked == [Asked("mixed", "sm_90", 4, 8, 64, 64)]
    assert tile_for("mixed", "sm_90", 4, 8, 64, 64) != forced
