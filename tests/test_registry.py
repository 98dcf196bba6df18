"""Discovery: every way in which a plugin can be bad is one row, and nothing else suffers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qplug_core.errors import PluginError, UsageError
from qplug_core.registry import Registry

sys.path.insert(0, str(Path(__file__).parent))
from distributions import GOOD, install


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("dist_")]:
        del sys.modules[name]


def row(registry, name):
    return next(r for r in registry.plugins if r.name == name)


def test_a_new_distribution_appears(site):
    install(site, "alpha")
    registry = Registry.discover({})
    assert row(registry, "alpha").state == "ready"
    assert registry.format_for_method("ALPHA").decl.name == "alpha"


@pytest.mark.parametrize(
    ("source", "state", "said"),
    [
        ("raise RuntimeError('boom')", "broken", "boom"),
        ("raise SystemExit(3)", "broken", "SystemExit"),
        ("import no_such_module_here", "broken", "no_such_module_here"),
        (GOOD.replace('"1.0"', '"2.0"'), "incompatible", "2.0"),
        (GOOD.replace('"1.0"', '"1.9"'), "incompatible", "1.9"),
        (GOOD.replace('API = "1.0"', ""), "incompatible", "API"),
        (GOOD.replace("return [FormatDecl", "return 7\n    return [FormatDecl"), "broken", "qplug_formats"),
        (GOOD.replace("W8A16 channel", "W99A16"), "broken", "W99A16"),
    ],
)
def test_a_bad_plugin_is_one_row(site, source, state, said):
    install(site, "bad", source)
    install(site, "good")
    registry = Registry.discover({})
    assert row(registry, "bad").state == state
    assert said in row(registry, "bad").reason
    assert row(registry, "good").state == "ready"
    assert all(entry.plugin.name != "bad" for entry in [*registry.formats, *registry.kernels])
    if state == "broken":
        assert "Traceback" in row(registry, "bad").traceback or row(registry, "bad").traceback


def test_two_claims_of_one_name_are_an_error_that_names_both(site):
    install(site, "one", claims="same")
    install(site, "two", claims="same")
    registry = Registry.discover({})
    with pytest.raises(PluginError, match=r"dist-one.*dist-two"):
        registry.format("same")
    assert registry.conflicts


def test_a_pin_decides_a_conflict(site):
    install(site, "one", claims="same")
    install(site, "two", claims="same")
    (site / "qplug.toml").write_text('[plugins.pin]\nsame = "dist-two"\n"same.fast" = "dist-two"\n')
    assert Registry.discover({}).format("same").plugin.distribution == "dist-two"


@pytest.mark.parametrize(("setting", "ready"), [("alpha", {"alpha"}), ("-alpha", {"beta"}), ("alpha,-beta", {"alpha"})])
def test_allow_and_deny(site, setting, ready):
    install(site, "alpha")
    install(site, "beta")
    registry = Registry.discover({"QPLUG_PLUGINS": setting})
    ours = {r.name: r for r in registry.plugins if r.name in ("alpha", "beta")}
    assert {name for name, r in ours.items() if r.state == "ready"} == ready
    assert all(r.state == "blocked" and r.reason for name, r in ours.items() if name not in ready)


def test_an_unknown_name_in_the_settings_lists_what_was_found(site):
    install(site, "alpha")
    with pytest.raises(UsageError, match="alpha"):
        Registry.discover({"QPLUG_PLUGINS": "alfa"})


def test_an_implementation_that_does_not_import_is_a_refusal(site):
    install(site, "alpha")
    registry = Registry.discover({})
    refusal = registry.load_refusal(registry.kernel("alpha.fast").decl)
    assert refusal is not None
    assert refusal.code == "import"


def test_discovery_imports_no_torch():
    code = "import sys, qplug_core, qplug_core.matrix, qplug_core.registry as r; r.get_registry(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_no_public_name_is_also_a_submodule():
    """Importing a submodule binds its name in the package, and a function of that name would be gone."""
    import pkgutil

    import qplug_core

    modules = {module.name for module in pkgutil.iter_modules(qplug_core.__path__)}
    assert not modules & set(qplug_core.__all__)
