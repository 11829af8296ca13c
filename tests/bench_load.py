"""
Loading GPT-2 Medium: time against reading and hashing its file, and peak memory against its size.

    python tests/bench_load.py
"""
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

BYTES = 1_419_292_672  # of OpenAI's gpt2-medium: 354,823,168 float32


def best(measure, times=3):
    """-> the least seconds of some runs: what the machine takes when nothing else runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        measure()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bench_load():
    """-> {figure: value} of from_pretrained on a checkpoint in OpenAI's form and gpt2-medium's shape, in the page cache."""
    import google_crc32c
    import numpy as np
    from test_load import openai_tensors, write_bundle

    from model import GPT
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shape = {'n_vocab': 50257, 'n_ctx': 1024, 'n_embd': 1024, 'n_head': 16, 'n_layer': 24}
        (folder / 'hparams.json').write_text(json.dumps(shape))
        write_bundle(folder / 'model.ckpt', openai_tensors(shape, np.random.default_rng(0)))
        data = folder / 'model.ckpt.data-00000-of-00001'
        assert data.stat().st_size == BYTES

        def whole():
            google_crc32c.value(data.read_bytes())

        def in_pieces():
            crc = 0
            with open(data, 'rb', buffering=0) as file:
                while piece := file.read(1 << 20):
                    crc = google_crc32c.extend(crc, piece)

        figures = {'read and hashed whole, s': best(whole), 'read and hashed in pieces of 1 MiB, s': best(in_pieces)}
        with contextlib.redirect_stdout(None):
            figures['from_pretrained, s'] = best(lambda: GPT.from_pretrained(folder))
        # memory in a process of its own, whose peak before loading is that of the imports
        process = subprocess.run([sys.executable, __file__, 'peak', folder], capture_output=True, text=True, check=True)
        before, after = map(int, process.stdout.split()[-2:])
        figures['peak over the imports / the model'] = (after - before) / BYTES
        figures['time / read and hashed whole'] = figures['from_pretrained, s'] / figures['read and hashed whole, s']
    return figures


def peak():
    """-> bytes: the most memory that this process has had, mapped files included."""
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024


if __name__ == '__main__' and sys.argv[1:2] == ['peak']:
    from model import GPT
    before = peak()
    GPT.from_pretrained(sys.argv[2])
    print(before, peak())
elif __name__ == '__main__':
    for name, value in bench_load().items():
        print(f'{name:44}{value:8.2f}')
