"""
export.py on a model of random weights: its time and memory, what the consumers give, and their speed for one prompt beside ours.

    python tests/bench_export.py            # Medium's shape; small, or a folder with a run, as an argument
"""
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from bench_load import peak  # noqa: E402

PROMPT = {'instruction': 'Rewrite the sentence in the passive voice.', 'input': 'Tom wrote the song.'}
NEW = 24  # tokens after the prompt
# the test split of random weights says nothing, so what a type loses is left out
FORMATS = [['huggingface'], ['gguf'], ['gguf', '--gguf_type=F16', '--dataset=absent'], ['gguf', '--gguf_type=Q8_0', '--dataset=absent'],
           ['onnx'], ['onnx', '--onnx_type=int8', '--dataset=absent'], ['torchscript']]
HEADER = ('format', 'GB', 'export, s', 'peak / model', 'verified by', 'largest difference', 'greedy ids equal', 'tokens/s, one prompt')


def child(*arguments):
    """What this file prints, run with these arguments in a process of its own."""
    process = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def measure_export(folder, name, *flags):
    """In this process, whose peak before is that of the imports: export.py as a user runs it, then seconds and the peak above that."""
    import runpy

    import export  # noqa: F401
    before = peak()
    began = time.perf_counter()
    sys.argv = ['export.py', f'--out_dir={folder}', f'--to={name}', *flags]
    runpy.run_path(str(ROOT / 'export.py'), run_name='__main__')
    print(f'\nmeasured {time.perf_counter() - began} {peak() - before}')


def median_speed(generate):
    """Tokens per second of generate(), which gives NEW ids: the median of three, after one that warms up."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        assert len(generate()) == NEW
        seconds.append(time.perf_counter() - began)
    return NEW / statistics.median(seconds[1:])


def measure_speed(folder, name):
    """Print the tokens per second of one prompt, decoded greedily, for each program that reads the format, or for the engine."""
    from engine import for_inference, generate, keep_freed_memory
    from export import FORMATS, greedy_ids
    from model import GPT
    from prepare import encode_prompt

    import torch
    keep_freed_memory()  # as the stages do; it helps the others, too
    torch.set_grad_enabled(False)
    prompt = encode_prompt(PROMPT)
    if name == 'engine.py':
        model = for_inference(GPT.from_pretrained(folder), torch.device('cpu'), torch.float32)
        print(f'speed {name}: {median_speed(lambda: generate(model, [prompt], NEW, eos=-1)[0]):.1f}')
        return
    try:
        _, read, _ = FORMATS[name]
        steps = read(Path(folder, 'export', name), '')
    except ModuleNotFoundError:
        return
    for program, step in steps.items():
        print(f'speed {program}: {median_speed(lambda: greedy_ids(step, prompt, NEW, eos=-1)):.1f}')


def size_of(folder, name, program):
    """GB of the file that a program reads: the newest, but TorchScript's ends in .pt."""
    endings = {'torch.jit': ['.pt'], 'torch.export': ['.pt2']}.get(program, ['.safetensors', '.gguf', '.onnx', '.pt2'])
    files = [path for path in Path(folder, 'export', name).rglob('*') if path.suffix in endings]
    return max(files, key=os.path.getmtime).stat().st_size / 1e9


def bench_format(folder, model_bytes, name, *flags):
    """The rows of HEADER for a format: one for each program that reads it."""
    printed = child('export', folder, name, *flags)
    seconds, peak_bytes = map(float, printed.split('\nmeasured ')[1].split())
    speeds = dict(re.findall(r'speed ([^:\n]+): (\S+)', child('speed', folder, name)))
    found = re.findall(r'^  ([^:\n]+): largest difference of logits (\S+), greedy ids of (\d) of 3', printed, re.MULTILINE)
    label = ' '.join([name, *(flag.split('=')[1] for flag in flags[:1])])
    rows = []
    for program, difference, equal in found or [('not installed', '', 0)]:
        rows.append((label, f'{size_of(folder, name, program):.2f}', f'{seconds:.1f}', f'{peak_bytes / model_bytes:.2f}', program,
                     difference, f'{equal} of 3', speeds.get(program, '')))
    return rows


def main(size='medium'):
    from bench import table, write_run
    with tempfile.TemporaryDirectory() as folder:
        if os.path.isdir(size):
            folder = size
            model_bytes = next(Path(size).glob('*-sft.pth')).stat().st_size
        else:
            model_bytes = write_run(Path(folder), size)
        rows = []
        for arguments in FORMATS:
            rows += bench_format(folder, model_bytes, *arguments)
        speed = child('speed', folder, 'engine.py').rsplit(': ', 1)[1].strip()
        rows.append(('engine.py', f'{model_bytes / 1e9:.2f}', '', '', '', '', '', speed))
    table('export', HEADER, rows)


if __name__ == '__main__':
    actions = {'export': measure_export, 'speed': measure_speed}
    action = actions.get(' '.join(sys.argv[1:2]))
    if action:
        action(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
