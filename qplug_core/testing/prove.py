"""``python -m qplug_core.testing.prove PLUGIN FOLDER``: run a plugin's kernels here, and write down that they ran.

Runs the conformance tests in FOLDER (the plugin's tests). Where they pass, ``proof.json`` in the plugin's package says of every kernel that
this machine has the hardware for: measured, on which processor, with which versions. A CPU kernel is also built for the
other instruction sets that it has code for: those are compiled. ``qplug list-methods`` claims what stands there and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..device import local_devices
from ..errors import UsageError
from ..kernels import builder
from ..registry import Registry, get_registry
from ..support import Refusal


def prove(registry: Registry, plugin: str) -> dict[str, Any]:
    """The contents of proof.json for a plugin whose conformance tests have passed here."""
    row = next((r for r in registry.plugins if r.name == plugin), None)
    if row is None or row.state != "ready":
        raise UsageError(f"plugin {plugin!r} is not installed and ready; see `qplug doctor`")
    about = {
        "date": datetime.date.today().isoformat(),
        "by": f"python -m qplug_core.testing.prove {plugin}",
        "versions": {name: importlib.metadata.version(name) for name in (row.distribution, "qplug-core", "torch")},
    }
    kernels: dict[str, Any] = {}
    for decl in row.declarations.kernels:
        found: dict[str, Any] = {}
        if "avx2" in decl.devices:
            for name in builder.SETS:
                if not any(isinstance(builder.build(source.stem, name), Refusal) for source in builder.FOLDER.glob("*.c")):
                    found[name] = {"status": "compiled", **about}
        for device in local_devices():
            if (
                device.matches_any(decl.devices)
                and not registry.kernel_requirements(decl)
                and registry.load_refusal(decl) is None
            ):
                found[device.arch] = {"status": "measured", "on": device.name, **about}
                if device.vendor == "cpu":
                    found["cpu"] = found[device.arch]
        kernels[decl.name] = found
    return {"schema": 1, "kernels": kernels}


def main() -> None:
    """Run the tests, then write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugin")
    parser.add_argument("folder", nargs="?", help="tests of the plugin; left out for core, whose tests are the project's")
    arguments = parser.parse_args()
    if arguments.folder:
        subprocess.run([sys.executable, "-m", "pytest", "-q", arguments.folder], check=True)
    registry = get_registry()
    body = prove(registry, arguments.plugin)
    module = next(r.module for r in registry.plugins if r.name == arguments.plugin)
    package = module.partition(".")[0] or "qplug_core"
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    target = Path(spec.origin).parent / "proof.json"
    target.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    print(f"{target}: {', '.join(body['kernels'])}")


if __name__ == "__main__":
    main()
