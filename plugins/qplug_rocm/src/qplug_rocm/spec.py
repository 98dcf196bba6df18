"""Quark's tensor specs, ``{"dtype": "fp8_e4m3", "qscheme": "per_channel", ...}``: read as TensorQuant, and written.

===================== ===================================== =======================================================
dtype, qscheme        weight                                input_tensors
===================== ===================================== =======================================================
fp8_e4m3 per_tensor   one scale                             one scale, stored or dynamic
fp8_e4m3 per_channel  ch_axis 0: one for each row           ch_axis 1, dynamic: one for each token (PTPC)
fp8_e4m3 per_group    e8m0, 32: MXFP8; float: any size      dynamic, the same
fp8_e4m3 per_block    block_size [bn, bk], float or e8m0    -
int8 per_tensor       symmetric                             one scale, stored (with a zero point) or dynamic
int8 per_channel      symmetric, ch_axis 0                  ch_axis 1, dynamic
fp4 per_group         e8m0, 32: MXFP4                       dynamic, the same
[fp4, fp8_e4m3]       groups of 16, then tensor: NVFP4      the same: dynamic groups, stored tensor scale
===================== ===================================== =======================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qplug_core.errors import ConfigError
from qplug_core.scheme import TensorQuant

DTYPES = {"fp8_e4m3": "fp8_e4m3", "int8": "int8", "fp4": "fp4_e2m1"}
FIXED: dict[str, tuple[Any, ...]] = {
    "round_method": ("half_even",),
    "scale_type": ("float", "float32"),
    "zero_point_type": ("int", "int8", "int32"),
    "is_scale_quant": (False,),
    "mx_element_dtype": (),
}
"""Keys that change the numbers, with the values that are understood beside null."""
READ = (
    "dtype",
    "qscheme",
    "ch_axis",
    "group_size",
    "block_size",
    "symmetric",
    "is_dynamic",
    "scale_format",
    "scale_calculation_mode",
)
METADATA = ("observer_cls", "enable_buffer_reuse", "max_input_numel", "qat_spec")
MODES = {"even": "even", "floor": "floor", "ceil": "up"}
"""``scale_calculation_mode`` by the rule that it is. For FP4, even is the common rule."""


def weight_quant(spec: Any, where: str) -> TensorQuant | None:
    """The weight part of one spec (a list of two is NVFP4); None leaves it at 16 bit.

    :raises ConfigError: for what this format has no tensors for, and for keys that are not known.
    """
    if not spec:
        return None
    if isinstance(spec, list):
        return _two_level(spec, where, activation=False)
    _check(spec, where)
    if spec.get("is_dynamic"):
        raise _refuse(where, "is_dynamic", True, "stored weights have stored scales")
    if spec.get("symmetric") is False:
        raise _refuse(
            where,
            "symmetric",
            False,
            "weights are symmetric in what engines read of Quark, so quantize again with symmetric true",
        )
    dtype, qscheme = DTYPES[spec["dtype"]], spec.get("qscheme")
    if qscheme == "per_tensor" and dtype != "fp4_e2m1":
        return TensorQuant(dtype, (0, 0))
    if qscheme == "per_channel" and dtype != "fp4_e2m1":
        if spec.get("ch_axis") != 0:
            raise _refuse(where, "ch_axis", spec.get("ch_axis"), "weights have one scale for each row, which is axis 0")
        return TensorQuant(dtype, (1, 0))
    if qscheme == "per_group" and dtype != "int8":
        return _grouped(spec, dtype, where)
    if qscheme == "per_block" and dtype == "fp8_e4m3":
        size = spec.get("block_size")
        if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size)):
            raise _refuse(where, "block_size", size, "[rows, columns] was needed")
        return TensorQuant(
            dtype, (size[0], size[1]), scale_dtype="e8m0" if "e8m0" in str(spec.get("scale_format")) else "float"
        )
    raise _refuse(
        where, "qscheme", qscheme, f"{spec['dtype']} weights of this kind are not read, so export with another scheme"
    )


def input_quant(spec: Any, where: str) -> TensorQuant | None:
    """The activation part of one spec; None leaves activations at 16 bit.

    :raises ConfigError: as :func:`weight_quant`.
    """
    if not spec:
        return None
    if isinstance(spec, list):
        return _two_level(spec, where, activation=True)
    _check(spec, where)
    dtype, qscheme, dynamic = DTYPES[spec["dtype"]], spec.get("qscheme"), bool(spec.get("is_dynamic"))
    # Quark divides by (127 + 128) / 2 and keeps -128.
    rule = "127.5" if dtype == "int8" and dynamic and spec.get("symmetric") is not False else ""
    symmetric = dtype != "int8" or spec.get("symmetric") is not False
    if qscheme == "per_tensor" and dtype != "fp4_e2m1":
        return TensorQuant(dtype, (0, 0), symmetric, dynamic, rule=rule)
    if qscheme == "per_channel" and dtype != "fp4_e2m1":
        if spec.get("ch_axis") not in (1, -1) or not dynamic:
            raise _refuse(
                where,
                "ch_axis",
                spec.get("ch_axis"),
                "activations by channel are one dynamic scale for each token, which is axis 1",
            )
        return TensorQuant(dtype, (1, 0), symmetric, True, rule=rule)
    if qscheme == "per_group" and dtype != "int8":
        if not dynamic:
            raise _refuse(where, "is_dynamic", False, "scales of activation groups are computed from each input")
        return _grouped(spec, dtype, where, dynamic=True)
    raise _refuse(
        where, "qscheme", qscheme, f"{spec['dtype']} activations of this kind are not read, so export with another scheme"
    )


def spec_of(part: TensorQuant, activation: bool) -> Any:
    """What Quark would write for ``part``."""
    if part.scale_dtype == "e4m3":
        groups = {
            "dtype": "fp4",
            "qscheme": "per_group",
            "group_size": 16,
            "ch_axis": -1,
            "is_dynamic": activation,
            "scale_format": "e4m3",
        }
        return [groups, {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "is_scale_quant": True}]
    name = next(key for key, value in DTYPES.items() if value == part.dtype)
    spec: dict[str, Any] = {
        "dtype": name,
        "is_dynamic": bool(part.dynamic),
        "round_method": "half_even",
        "symmetric": part.symmetric,
    }
    rows, columns = part.block
    if columns and rows == 1:
        mx = part.scale_dtype == "e8m0"
        spec |= {
            "qscheme": "per_group",
            "group_size": columns,
            "ch_axis": -1,
            "symmetric": None,
            "scale_format": "e8m0" if mx else "float32",
        }
        if mx:
            spec["scale_calculation_mode"] = next((mode for mode, rule in MODES.items() if rule == part.rule), "even")
    elif rows > 1:
        spec |= {
            "qscheme": "per_block",
            "block_size": [rows, columns],
            "scale_format": "e8m0" if part.scale_dtype == "e8m0" else "float32",
        }
    elif part.block == (1, 0):
        spec |= {"qscheme": "per_channel", "ch_axis": 1 if activation else 0}
    else:
        spec |= {"qscheme": "per_tensor"}
    return spec


def _grouped(spec: Mapping[str, Any], dtype: str, where: str, dynamic: bool = False) -> TensorQuant:
    group, form, mode = spec.get("group_size"), spec.get("scale_format") or "float32", spec.get("scale_calculation_mode")
    if spec.get("ch_axis") not in (-1, 1):
        raise _refuse(where, "ch_axis", spec.get("ch_axis"), "groups run along the columns, which is axis -1")
    if form == "e8m0":
        if group != 32:
            raise _refuse(where, "group_size", group, "scales that are powers of two have groups of 32")
        rule = MODES[mode or "even"] if dynamic else ""
        rule = "" if rule == "even" and dtype == "fp4_e2m1" else rule
        return TensorQuant(dtype, (1, 32), dynamic=dynamic, scale_dtype="e8m0", rule=rule)
    if form == "float32" and dtype == "fp8_e4m3" and isinstance(group, int) and group > 0:
        return TensorQuant(dtype, (1, group), dynamic=dynamic)
    raise _refuse(
        where,
        "scale_format",
        form,
        f"{spec['dtype']} groups of {group} with such scales are not read, so export as MXFP4 or FP8",
    )


def _two_level(specs: list[Any], where: str, activation: bool) -> TensorQuant:
    if len(specs) == 2 and all(isinstance(s, dict) for s in specs):
        for spec in specs:
            _check({**spec, "is_scale_quant": None}, where)
        first, second = specs
        fp4 = (first["dtype"], first.get("qscheme"), first.get("group_size"), bool(first.get("is_dynamic")))
        outer = (second["dtype"], second.get("qscheme"), bool(second.get("is_dynamic")))
        if fp4 == ("fp4", "per_group", 16, activation) and outer == ("fp8_e4m3", "per_tensor", False):
            return TensorQuant("fp4_e2m1", (1, 16), dynamic="local" if activation else False, scale_dtype="e4m3")
    dtypes = [s.get("dtype") if isinstance(s, dict) else s for s in specs]
    raise ConfigError(
        f"the Quark config has {where} in the stages {dtypes}; NVFP4 (fp4 in groups of 16, then fp8_e4m3) is the only such form that is "
        "read, so export with another scheme"
    )


def _check(spec: Any, where: str) -> None:
    if not isinstance(spec, dict):
        raise ConfigError(
            f"the Quark config says {where}: {spec!r}; an object with dtype and qscheme was needed, so export it again"
        )
    for key, value in spec.items():
        if value is None or value in ([], {}):
            continue
        if key not in READ and key not in FIXED and key not in METADATA:
            raise ConfigError(
                f"the Quark config has the key {key!r} in {where}, which is not known and may change the numbers; use a newer qplug-rocm"
            )
        if key in FIXED and value not in FIXED[key]:
            raise _refuse(where, key, value, "another function of the numbers, so export the checkpoint without it")
    if spec.get("dtype") not in DTYPES:
        raise _refuse(where, "dtype", spec.get("dtype"), f"{', '.join(DTYPES)} are read, so export with one of them")
    mode = spec.get("scale_calculation_mode")
    if mode not in (None, *MODES):
        raise _refuse(where, "scale_calculation_mode", mode, f"{', '.join(MODES)} are understood")


def _refuse(where: str, key: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f"the Quark config says {key}: {value!r} in {where}; {needed}")
