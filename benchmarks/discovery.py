"""Discovery: wall time of ``qplug list-methods`` with five plugins, and the share of Python's own start-up.

    python benchmarks/discovery.py [--runs 15] [--json OUT]

The plugins are the installed ones, and copies of the ``qplug new-plugin`` skeleton in a temporary folder up to five. Medians, warm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLUGINS = 5


def add_plugins(folder: Path, count: int) -> None:
    """Skeleton plugins as pip would leave them."""
    for i in range(count):
        name = f"bench{i}"
        subprocess.run(
            [sys.executable, "-m", "qplug_core", "new-plugin", name, "--directory", str(folder)],
            check=True,
            capture_output=True,
        )
        (folder / f"qplug_{name}" / "src" / f"qplug_{name}").rename(folder / f"qplug_{name}_package")
        info = folder / f"qplug_{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: qplug-{name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[qplug.plugins]\n{name} = qplug_{name}.plugin\n")
        for left in (folder / f"qplug_{name}").rglob("*"):
            if left.is_file():
                left.unlink()
        for left in sorted((folder / f"qplug_{name}").rglob("*"), reverse=True):
            left.rmdir()
        (folder / f"qplug_{name}").rmdir()
        (folder / f"qplug_{name}_package").rename(folder / f"qplug_{name}")


def median(command: list[str], runs: int, environment: dict[str, str]) -> float:
    """Milliseconds of a whole process."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    body = json.loads(
        subprocess.run(
            [sys.executable, "-m", "qplug_core", "list-methods", "--json"], check=True, capture_output=True
        ).stdout
    )
    installed = sum(p["name"] != "core" for p in body["plugins"])
    with tempfile.TemporaryDirectory() as name:
        add_plugins(Path(name), max(0, PLUGINS - installed))
        environment = {**os.environ, "PYTHONPATH": name}
        start_up = median([sys.executable, "-c", "pass"], arguments.runs, environment)
        whole = median([sys.executable, "-m", "qplug_core", "list-methods"], arguments.runs, environment)
        bare = median([sys.executable, "-c", "import qplug_core"], arguments.runs, environment)
    print(f"qplug list-methods with {max(PLUGINS, installed)} plugins {whole:6.0f} ms (goal 300)")
    print(f"import qplug_core                       {bare:6.0f} ms")
    print(f"python start-up                         {start_up:6.0f} ms, {start_up / whole:.0%} of list-methods")
    if arguments.json:
        about = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "command": " ".join(["python", "benchmarks/discovery.py", *sys.argv[1:]]),
        }
        figures = {"list_methods_ms": whole, "import_ms": bare, "python_ms": start_up, "plugins": max(PLUGINS, installed)}
        arguments.json.write_text(json.dumps({"schema": 1, **about, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
