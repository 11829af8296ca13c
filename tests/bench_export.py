"""
export.py on a model of random weights: its time and memory, what the consumers give, and their speed for one prompt beside ours.

    python tests/bench_export.py            # Medium's shape; small, or a folder with a run, as an argument
"""
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from bench_load import peak  # noqa: E402

PROMPT = {'instruction': 'Rewrite the sentence in the passive voice.', 'input': 'Tom wrote the song.'}
NEW = 24  # tokens after the prompt
FORMATS = [('huggingface',), ('gguf',), ('gguf', '--gguf_type=F16'), ('gguf', '--gguf_type=Q8_0'), ('onnx',), ('torchscript',)]


def write_run(folder, size):
    """A run of random weights in one of bench's SHAPES."""
    import torch
    from bench import build
    model = build(size)
    torch.save(model.state_dict(), folder / f'{model.config.name}-sft.pth')
    about = {'model': asdict(model.config), 'init_from': 'scratch', 'sha256': '', 'config': {}, 'step': 0, 'val_loss': 0.0}
    (folder / f'{model.config.name}-sft.json').write_text(json.dumps(about))
    return sum(p.numel() for p in model.parameters()) * 4


def child(*arguments):
    process = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def measure_export(folder, name, *flags):
    """In this process, whose peak before is that of the imports: export.py as a user runs it, then peaks and seconds."""
    import runpy

    import torch  # noqa: F401

    import judge  # noqa: F401
    before, began = peak(), time.perf_counter()
    sys.argv = ['export.py', f'--out_dir={folder}', f'--to={name}', *flags]
    runpy.run_path(str(ROOT / 'export.py'), run_name='__main__')
    print(f'\nmeasured {time.perf_counter() - began} {peak() - before}')


def measure_speed(folder, name):
    """Print the tokens per second of one prompt, decoded greedily: the median of three, for each program that reads the format."""
    import torch

    from config import keep_freed_memory
    from export import open_exported
    from model import GPT
    from prepare import encode_prompt
    keep_freed_memory()  # as the stages do; it helps the others, too
    torch.set_grad_enabled(False)
    model = GPT.from_pretrained(folder).eval()
    models, prompts = {'model.py': model}, [encode_prompt(PROMPT)]
    if name != 'model.py':
        exported = open_exported(name, Path(folder, 'export', name), model.config, '', '')
        models = {one.program: one for one in exported}
    for program, one in models.items():
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            assert len(one.generate(prompts, NEW, eos=-1)[0]) == NEW
            seconds.append(time.perf_counter() - began)
        print(f'speed {program}: {NEW / statistics.median(seconds[1:]):.1f}')


def bench_export(size):
    """-> rows of (format, GB, s, peak over the imports in sizes of the fp32 model, program, largest difference, tokens/s)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if os.path.isdir(size):
            folder, model_bytes = size, next(Path(size).glob('*-sft.pth')).stat().st_size
        else:
            model_bytes = write_run(Path(folder), size)
        for name, *flags in FORMATS:
            if flags:  # the test split of random weights says nothing
                flags.append('--dataset=absent')
            printed = child('export', folder, name, *flags)
            seconds, peak_bytes = map(float, printed.split('\nmeasured ')[1].split())
            files = [path for path in Path(folder, 'export', name).iterdir() if path.suffix in ('.safetensors', '.gguf', '.onnx', '.pt', '.pt2')]
            newest = max(files, key=os.path.getmtime)
            speeds = dict(re.findall(r'speed (\S+): (\S+)', child('speed', folder, name)))
            found = re.findall(r'^  (\S+): largest difference of logits (\S+), greedy ids of (\d) of 3', printed, re.M)
            for program, difference, equal in found or [('not installed', '', 0)]:
                gigabytes = next((p for p in files if program == 'torch.jit' and p.suffix == '.pt'), newest).stat().st_size / 1e9
                rows.append((' '.join([name, *(flag.split('=')[1] for flag in flags[:1])]), f'{gigabytes:.2f}', f'{seconds:.1f}',
                             f'{peak_bytes / model_bytes:.2f}', program, difference, f'{equal} of 3', speeds.get(program, '')))
        rows.append(('model.py', f'{model_bytes / 1e9:.2f}', '', '', '', '', '', re.search(r': (\S+)', child('speed', folder, 'model.py').split('speed')[1])[1]))
    return rows


HEADER = ('format', 'GB', 'export, s', 'peak / model', 'verified by', 'largest difference', 'greedy ids equal', 'tokens/s, one prompt')

if __name__ == '__main__' and sys.argv[1:2] == ['export']:
    measure_export(*sys.argv[2:])
elif __name__ == '__main__' and sys.argv[1:2] == ['speed']:
    measure_speed(*sys.argv[2:])
elif __name__ == '__main__':
    from bench import table
    table('export', HEADER, bench_export(*(sys.argv[1:] or ['medium'])))
