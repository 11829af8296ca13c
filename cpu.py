"""
What makes torch fast on a CPU and has to be set before it loads: `import cpu` above `import torch`. What the user set stays.
"""
import ctypes
import os
import platform

if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # a thread that waits for long should leave the core to other programs
if platform.libc_ver()[0] == 'glibc':
    # what a step frees, the next one takes: glibc keeps it, instead of returning it and faulting it in again
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
