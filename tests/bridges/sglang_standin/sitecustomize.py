"""Python imports this at start where the folder is on PYTHONPATH: SGLang's own processes get the stand-in too."""

import absent_kernels  # noqa: F401
