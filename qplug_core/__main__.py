"""``python -m qplug_core``: the same as ``qplug``."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="qplug")
