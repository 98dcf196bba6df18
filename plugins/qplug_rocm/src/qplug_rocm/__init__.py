"""AMD for qplug: Quark checkpoints, PTPC FP8, and exact conversion to the e4m3fnuz numbers of gfx942."""
