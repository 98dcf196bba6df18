from qplug_core.testing import PluginConformance


class TestConformance(PluginConformance):
    plugin = "gguf"
