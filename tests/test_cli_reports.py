"""list-methods, doctor and new-plugin, as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from distributions import install


def qplug(*arguments, cwd, env=None, site=None):
    import os

    environment = {**os.environ, **(env or {})}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, "-m", "qplug_core", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


def test_the_table_fits_a_hundred_columns(tmp_path):
    done = qplug("list-methods", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    assert "int8" in done.stdout


def test_json_has_the_promised_keys(tmp_path):
    body = json.loads(qplug("list-methods", "--json", cwd=tmp_path).stdout)
    assert body["schema"] == 1
    assert {"machine", "plugins", "methods"} <= body.keys()
    assert {"name", "distribution", "version", "api", "state", "reason"} <= body["plugins"][0].keys()
    method = next(m for m in body["methods"] if m["name"] == "gptq")
    assert {"name", "plugin", "schemes", "load", "ops", "devices"} <= method.keys()
    assert {"cpu", "avx2", "sm_70", "sm_120", "gfx90a", "gfx1201"} <= method["devices"].keys()
    for cell in method["devices"].values():
        assert cell["status"] in ("native", "weight-only", "emulated", "reference", "no")
        assert cell["proof"] in ("measured", "compiled", "declared")


def test_markdown_has_a_column_for_each_device(tmp_path):
    lines = qplug("list-methods", "--markdown", cwd=tmp_path).stdout.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "sm_90" in lines[0]


def test_an_unknown_device_is_one_line_and_exit_2(tmp_path):
    done = qplug("list-methods", "--device", "sm_9000", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_a_broken_plugin_is_seen_and_the_rest_works(tmp_path):
    install(tmp_path / "site", "bad", "raise RuntimeError('boom')")
    done = qplug("list-methods", cwd=tmp_path, site=tmp_path / "site")
    assert done.returncode == 0
    assert "boom" in done.stdout
    assert "gptq" in done.stdout
    doctor = qplug("doctor", "--verbose", cwd=tmp_path, site=tmp_path / "site")
    assert doctor.returncode == 4
    assert "RuntimeError" in doctor.stdout


def test_an_unknown_allowed_plugin_is_an_error(tmp_path):
    done = qplug("list-methods", cwd=tmp_path, env={"QPLUG_PLUGINS": "nonsense"})
    assert done.returncode == 2
    assert "gptq" in done.stderr


@pytest.mark.parametrize("name", ["Upper", "9x", "a-b", "class", "core"])
def test_a_bad_plugin_name_writes_nothing(tmp_path, name):
    done = qplug("new-plugin", name, cwd=tmp_path)
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())


def test_the_skeleton_is_discovered_and_claims_nothing_it_has_not(tmp_path):
    assert qplug("new-plugin", "mine", cwd=tmp_path).returncode == 0
    assert qplug("new-plugin", "mine", cwd=tmp_path).returncode == 2
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert "qplug_mine/src/qplug_mine/kernels/torch_w8a16.py" in files
    assert not any("NAME" in (tmp_path / f).read_text() or f.endswith(".in") for f in files)
    site = tmp_path / "qplug_mine" / "src"
    info = site / "qplug_mine-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qplug-mine\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[qplug.plugins]\nmine = qplug_mine.plugin\n")
    body = json.loads(qplug("list-methods", "--json", cwd=tmp_path, site=site).stdout)
    assert next(p for p in body["plugins"] if p["name"] == "mine")["state"] == "ready"
