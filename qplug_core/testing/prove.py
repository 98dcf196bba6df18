"""``python -m qplug_core.testing.prove PLUGIN FOLDER``: run a plugin's kernels here, and write down that they ran.

Runs the conformance tests in FOLDER (the plugin's tests). Where they pass, ``proof.json`` in the plugin's package says of every kernel that
this machine has the hardware for: measured, on which processor, with which versions. Tests of CPU kernels run with every
instruction set that this machine has; for the others that there is code for, kernels are built: those are compiled.
``qplug list-methods`` claims what stands there and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..device import Device, local_devices
from ..errors import UsageError
from ..kernels import builder
from ..registry import Registry, get_registry
from ..support import Refusal


def prove(registry: Registry, plugin: str, sets: Sequence[str] = ()) -> dict[str, Any]:
    """The contents of proof.json for a plugin whose conformance tests have passed here, those of CPU kernels with each of ``sets``."""
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
                    ran = {"status": "measured", "on": Device.cpu().name} if name in sets else {"status": "compiled"}
                    found[name] = {**ran, **about}
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


def _keep_others(body: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Take over what other commands proved of kernels that are still declared, such as the compile matrix."""
    for name, found in body["kernels"].items():
        for device, proof in earlier["kernels"].get(name, {}).items():
            if not proof["by"].startswith("python -m qplug_core.testing.prove "):
                found.setdefault(device, proof)


def main() -> None:
    """Run the tests, then write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugin")
    parser.add_argument("folder", nargs="?", help="tests of the plugin; left out for core, whose tests are the project's")
    arguments = parser.parse_args()
    if arguments.folder:
        subprocess.run([sys.executable, "-m", "pytest", "-q", arguments.folder], check=True)
    registry = get_registry()
    declared = [k for r in registry.plugins if r.name == arguments.plugin for k in r.declarations.kernels]
    sets = (
        [name for name in builder.SETS if name in Device.cpu().features]
        if any("avx2" in k.devices for k in declared)
        else []
    )
    for name in sets[1:] if arguments.folder else []:
        print(f"{name}:", flush=True)
        environment = {**os.environ, builder.VARIABLE: name}
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "cpu_", arguments.folder], check=True, env=environment)
    body = prove(registry, arguments.plugin, sets)
    module = next(r.module for r in registry.plugins if r.name == arguments.plugin)
    package = module.partition(".")[0] or "qplug_core"
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    target = Path(spec.origin).parent / "proof.json"
    if target.exists():
        _keep_others(body, json.loads(target.read_text(encoding="utf-8")))
    target.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    print(f"{target}: {', '.join(body['kernels'])}")


if __name__ == "__main__":
    main()
