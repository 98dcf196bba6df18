"""The embedded model: its weights, the scripts that made them, and the main job that runs on it."""
