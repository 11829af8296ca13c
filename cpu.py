"""
What makes torch fast on a CPU and has to be set before it loads: `import cpu` above `import torch`. What the user set stays.
"""
import ctypes
import os
import platform

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # spinning threads crawl where other programs run, too
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # torch puts large tensors in huge pages
if platform.libc_ver()[0] == 'glibc':
    # what a step frees, the next one takes: glibc keeps it, instead of returning it and faulting it in again
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
