from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qplug_core.device import Device
from qplug_core.errors import NoKernel
from qplug_core.kernels import builder
from qplug_core.support import Refusal


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing loaded by this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builder.load.cache_clear()
    yield tmp_path
    builder.load.cache_clear()


def test_build_puts_one_object_into_the_cache_and_finds_it_again(fresh: Path) -> None:
    first = builder.build("int8", "avx2")
    assert isinstance(first, Path)
    assert first.parent == fresh / "qplug"
    stamp = first.stat().st_mtime_ns
    assert builder.build("int8", "avx2") == first
    assert first.stat().st_mtime_ns == stamp
    assert [p.name for p in first.parent.iterdir()] == [first.name]


@pytest.mark.parametrize("chosen", list(builder.SETS))
@pytest.mark.parametrize("name", ["weight_only", "int8", "quantize", "packing", "embedding", "wint2"])
def test_every_source_compiles_for_every_instruction_set_without_warnings(name: str, chosen: str, tmp_path: Path) -> None:
    # Optimization takes most of the time and finds no errors.
    command = ["cc", *builder.FLAGS, *builder.SETS[chosen], "-O0", "-Wall", "-Wextra", "-Werror"]
    assert builder.compile_to(tmp_path / "kernel.so", name, command) == tmp_path / "kernel.so"


def test_openmp_is_not_linked(fresh: Path) -> None:
    path = builder.build("int8", "avx2")
    needed = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    assert "gomp" not in needed


def test_missing_compiler_is_a_refusal_with_a_remedy(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    found = builder.load("weight_only")
    assert isinstance(found, Refusal)
    assert found.code == "requires"
    assert "/nonexistent/cc" in found.have
    assert found.remedy
    assert builder.refusals("weight_only", Device.cpu()) == [found]
    with pytest.raises(NoKernel, match="/nonexistent/cc"):
        builder.library("weight_only")


def test_failing_compiler_is_a_refusal_that_tells_its_error(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -include /nonexistent.h")
    found = builder.build("int8", "avx2")
    assert isinstance(found, Refusal)
    assert found.code == "requires"
    assert "error" in found.have
    assert list((fresh / "qplug").iterdir()) == []


def test_object_that_does_not_load_is_a_refusal(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = builder.instruction_set(Device.cpu())
    path = builder.build("int8", chosen)
    path.write_bytes(b"no ELF")
    found = builder.load("int8")
    assert isinstance(found, Refusal)
    assert found.code == "requires"


def test_prebuilt_object_beside_the_source_is_taken_first(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(builder, "FOLDER", tmp_path)
    (tmp_path / "k.c").write_text('__attribute__((visibility("default"))) int answer(void) { return 42; }')
    prebuilt = tmp_path / f"k-avx2-{builder.source_digest('k')}.so"
    builder.compile_to(prebuilt, "k", ["cc", *builder.FLAGS])
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert builder.build("k", "avx2") == prebuilt
    assert ctypes.CDLL(str(prebuilt)).answer() == 42
    (tmp_path / "k.c").write_text("int answer(void) { return 43; }")
    assert isinstance(builder.build("k", "avx2"), Refusal)


def test_unwritable_cache_falls_back_to_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = builder.build("int8", "avx2")
    assert isinstance(path, Path)
    assert path.exists()
    assert tmp_path not in path.parents
    assert path.parent.stat().st_mode & 0o077 == 0


def test_processes_that_build_at_once_all_succeed(fresh: Path) -> None:
    code = (
        "from qplug_core.kernels import builder; p = builder.build('int8', 'avx2'); import ctypes; print(p.stat().st_size)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sizes = {p.communicate()[0] for p in running}
    assert all(p.returncode == 0 for p in running)
    assert len(sizes) == 1
    assert len(list((fresh / "qplug").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("avx2", "avx2"), ("avx512", "avx512"), ("avx512_vnni", "avx512_vnni"), ("amx", "avx512_bf16"), ("neon", None)],
)
def test_instruction_set_of_named_devices(name: str, chosen: str | None) -> None:
    assert builder.instruction_set(Device.from_name(name)) == chosen


def test_a_lower_instruction_set_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(builder.VARIABLE, "avx512")
    assert builder.instruction_set(Device.from_name("avx512_bf16")) == "avx512"
    assert builder.instruction_set(Device.from_name("avx2")) == "avx2"


def test_other_devices_are_refused_without_a_build(fresh: Path) -> None:
    assert [r.code for r in builder.refusals("int8", Device.from_name("sm_90"))] == ["device"]
    assert [r.code for r in builder.refusals("int8", Device.from_name("neon"))] == ["device"]
    assert not (fresh / "qplug").exists()


def test_header_that_another_source_includes_is_no_part_of_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "FOLDER", tmp_path)
    (tmp_path / "k.c").write_text('#include "a.h"\n')
    (tmp_path / "a.h").write_text('#include "b.h"\n')
    (tmp_path / "b.h").write_text("enum { B = 1 };\n")
    (tmp_path / "c.h").write_text("enum { C = 1 };\n")
    before = builder.source_digest("k")
    (tmp_path / "c.h").write_text("enum { C = 2 };\n")
    assert builder.source_digest("k") == before
    (tmp_path / "b.h").write_text("enum { B = 2 };\n")
    assert builder.source_digest("k") != before


def test_nothing_on_the_path_is_a_refusal_with_a_remedy(tmp_path: Path) -> None:
    code = "from qplug_core.kernels import builder; print(builder.load('int8'))"
    environment = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "no C compiler (cc was not found)" in done.stdout
    assert "install gcc, or set CC" in done.stdout


def test_wheel_with_built_kernels_needs_no_compiler(tmp_path: Path) -> None:
    """A wheel of one kernel, as QPLUG_PREBUILD=1 makes it: of one platform, of any Python, and found with nothing on the PATH."""
    pytest.importorskip("setuptools.command.bdist_wheel")
    root = Path(__file__).parents[2]
    package = tmp_path / "source" / "qplug_core"
    for name in (
        "__init__.py",
        "device.py",
        "errors.py",
        "support.py",
        "bridges/transformers/hook.py",
        "kernels/__init__.py",
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "qplug_core" / name, package / name)
    for name in ("builder.py", "quantize.c", "vec.h"):
        shutil.copy(root / "qplug_core" / "kernels" / name, package / "kernels" / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(root / name, package.parent / name)
    environment = {**os.environ, "QPLUG_PREBUILD": "1"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=package.parent, env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        objects = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "installed")
    digest = builder.source_digest("quantize")
    assert sorted(objects) == sorted(f"qplug_core/kernels/quantize-{chosen}-{digest}.so" for chosen in builder.SETS)
    code = "from qplug_core.kernels import builder; print(builder.build('quantize', 'avx2'))"
    environment = {"PATH": "", "PYTHONPATH": str(tmp_path / "installed"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == str(tmp_path / "installed" / "qplug_core" / "kernels" / f"quantize-avx2-{digest}.so")
    assert not (tmp_path / "cache").exists()
