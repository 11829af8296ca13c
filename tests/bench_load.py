"""
Loading a model: time against reading and hashing its file, and peak memory against its size.

    python tests/bench_load.py            # Medium's shape, or another as an argument
"""
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]


def peak():
    """Bytes: the most memory that this process has had, mapped files included."""
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024


def write_checkpoint(folder, size):
    """A checkpoint in OpenAI's form, in one of bench's SHAPES, of random weights: its file of numbers."""
    import numpy as np
    from bench import SHAPES
    from test_load import openai_tensors, write_bundle
    n_layer, n_head, n_embd = SHAPES[size]
    shape = {'n_vocab': 50257, 'n_ctx': 1024, 'n_embd': n_embd, 'n_head': n_head, 'n_layer': n_layer}
    (folder / 'hparams.json').write_text(json.dumps(shape))
    write_bundle(folder / 'model.ckpt', openai_tensors(shape, np.random.default_rng(0)))
    return folder / 'model.ckpt.data-00000-of-00001'


def write_form(folder, form):
    """A model of the shape of folder's checkpoint, which is OpenAI's, in another form -> its folder."""
    from model import GPT, transpose_conv1d

    import torch
    from safetensors.torch import save_file
    from test_load import chapter_7_state
    model = GPT.from_pretrained(folder)
    other = folder / form
    other.mkdir()
    state = model.state_dict()
    fields = json.dumps({'model': vars(model.config)})
    if form == 'safetensors':
        state = {name: transpose_conv1d(name, tensor).contiguous() for name, tensor in state.items()}
        save_file(state, other / 'model.safetensors')
        (other / 'config.json').write_text(fields)
    elif form == 'nanoGPT':
        # without biases, as it trains by default
        state = {f'_orig_mod.transformer.{name}': tensor for name, tensor in state.items() if not name.endswith('bias')}
        torch.save({'model': state, 'model_args': vars(model.config)}, other / 'ckpt.pt')
    elif form == 'chapter 7':
        config = model.config
        torch.save(chapter_7_state(config.n_layer, config.n_embd, config.vocab_size, config.block_size), other / 'x-sft.pth')
    else:
        torch.save(state, other / 'x-sft.pth')
        (other / 'x-sft.json').write_text(fields)
    return other


def peak_of(folder):
    """Bytes that loading folder takes at its peak beyond the imports, in a process of its own."""
    process = subprocess.run([sys.executable, __file__, 'peak', folder], capture_output=True, text=True, check=True)
    before, after = map(int, process.stdout.split()[-2:])
    return after - before


def bench_load(size):
    """{figure: value} of from_pretrained, with the file in the page cache; the least of three runs, which is what nothing else disturbed."""
    from model import GPT

    import google_crc32c
    from bench import seconds_of

    def best(function):
        return min(seconds_of(function) for _ in range(3))

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = write_checkpoint(folder, size)
        n_bytes = data.stat().st_size

        def in_pieces():
            crc = 0
            with open(data, 'rb', buffering=0) as file:
                while piece := file.read(1 << 20):
                    crc = google_crc32c.extend(crc, piece)

        figures = {'read and hashed whole, s': best(lambda: google_crc32c.value(data.read_bytes())),
                   'read and hashed in pieces of 1 MiB, s': best(in_pieces)}
        with contextlib.redirect_stdout(None):
            figures['from_pretrained, s'] = best(lambda: GPT.from_pretrained(folder))
        figures["OpenAI's: peak over the imports / the model"] = peak_of(folder) / n_bytes
        for form in 'safetensors', 'nanoGPT', 'chapter 7', 'ours':
            with contextlib.redirect_stdout(None):
                other = write_form(folder, form)
            figures[f'{form}: peak / the model'] = peak_of(other) / n_bytes
            shutil.rmtree(other)
    figures['time / read and hashed whole'] = figures['from_pretrained, s'] / figures['read and hashed whole, s']
    return figures


if __name__ == '__main__' and sys.argv[1:2] == ['peak']:
    from model import GPT
    before = peak()
    GPT.from_pretrained(sys.argv[2])
    print(before, peak())
elif __name__ == '__main__':
    for size in sys.argv[1:] or ['medium']:
        print(f'\n### loading {size}\n')
        for name, value in bench_load(size).items():
            print(f'{name:44}{value:8.2f}')
