"""A script, run in its own process: one line for each NVIDIA GPU, ``arch, bytes, shared bytes, name`` between tabs.

It asks the CUDA driver through ctypes. Exit code 1 where the driver does not start.
"""

import ctypes
import os
import sys

MAJOR, MINOR, SHARED_OPTIN = 75, 76, 97
"""Values of CUdevice_attribute in cuda.h."""


def main() -> int:
    """Print the GPUs."""
    cuda = ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return 1
    for index in range(count.value):
        device = ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        values = []
        for attribute in (MAJOR, MINOR, SHARED_OPTIN):
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            values.append(value.value)
        memory = ctypes.c_size_t()
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        name = ctypes.create_string_buffer(128)
        cuda.cuDeviceGetName(name, len(name), device)
        major, minor, shared = values
        print(f"sm_{major}{minor}", memory.value, shared, name.value.decode(), sep="\t")
    return 0


if __name__ == "__main__":
    sys.exit(main())
