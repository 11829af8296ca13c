"""
One prompt at a time: how near a decode step comes to what reading the weights once takes.

    python tests/bench_decode.py            # Small and Medium; other sizes as arguments

A step's time is that of 33 new tokens less that of one, over 32; programs take turns, medians of five. transformers and llama.cpp
take part where they are installed.
"""
import operator
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from engine import for_inference, generate, keep_freed_memory  # noqa: E402
from export import FORMATS, greedy_ids  # noqa: E402
from prepare import encode_prompt  # noqa: E402

import torch  # noqa: E402
from bench import CPU, build, processor_flags, race, read_data, seconds_of, table, test_prompts, write_run  # noqa: E402

PROMPT = encode_prompt({'instruction': 'Rewrite the sentence in the passive voice.', 'input': 'The girl kicked the ball.'})
STEPS = 32
DTYPES = {'fp32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def read_bandwidth():
    """Bytes a second of a sum over 1 GB, which no cache holds."""
    numbers = torch.ones(250_000_000)
    return 1e9 / statistics.median(seconds_of(numbers.sum) for _ in range(7))


def exported_step(folder, name, *flags):
    """(program, step) of what reads export.py's files of the run in folder, or None where it is not installed."""
    command = [sys.executable, ROOT / 'export.py', f'--out_dir={folder}', f'--to={name}', '--dataset=absent', *flags]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    _, read, _ = FORMATS[name]
    try:
        return next(iter(read(Path(folder, 'export', name), '').items()))
    except (ImportError, OSError, StopIteration) as error:
        print(f'{name} is left out: {error or process.stderr.strip()}')


def programs_of(size, folder, weight_bytes):
    """{program: (function of how many new tokens are wanted, bytes that a step reads)}."""
    programs = {}
    for name, dtype in DTYPES.items():
        model = for_inference(build(size), CPU, dtype)
        programs[f'engine.py, {name}'] = lambda n, model=model: generate(model, [PROMPT], n, eos=-1), weight_bytes * dtype.itemsize / 4
    write_run(folder, size)
    for name, *flags, share in (('huggingface', 1), ('gguf', 1), ('gguf', '--gguf_type=F16', 2)):
        found = exported_step(folder, name, *flags)
        if found:
            program, step = found
            form = 'F16' if flags else 'fp32'
            programs[f'{program}, {form}'] = lambda n, step=step: greedy_ids(step, PROMPT, n, eos=-1), weight_bytes / share
    return programs


def compare_many(size):
    """All test prompts at once, in each precision."""
    prompts = test_prompts(read_data('instruction-data')[1], 12 if size == 'tiny' else 110)
    ids = {}
    seconds = {}
    for name, dtype in DTYPES.items():
        model = for_inference(build(size), CPU, dtype)
        answers = []
        seconds[name] = seconds_of(lambda model=model, answers=answers: answers.extend(generate(model, prompts, 24, eos=-1)))
        ids[name] = [id for answer in answers for id in answer]
    rows = []
    for name in DTYPES:
        equal = sum(map(operator.eq, ids[name], ids['fp32'])) / len(ids['fp32'])
        rows.append((name, f'{seconds[name]:.2f}', f'{100 * equal:.2f} %'))
    table(f'{size}: {len(prompts)} prompts at once, 24 new tokens each', ('precision', 's', 'greedy ids equal'), rows)


@torch.inference_mode()
def bench_decode(size, bandwidth):
    """A row for each program that decodes a model of this size. bandwidth: bytes that are read a second."""
    weight_bytes = 4 * sum(p.numel() for name, p in build(size).named_parameters() if name != 'wpe.weight')
    with tempfile.TemporaryDirectory() as folder:
        programs = programs_of(size, Path(folder), weight_bytes)
        calls = {}
        for program, (run, _) in programs.items():
            for n in 1, STEPS + 1:
                calls[program, n] = lambda run=run, n=n: run(n)
        seconds = race(calls, 5)
    rows = []
    for program, (_, its_bytes) in programs.items():
        step = (seconds[program, STEPS + 1] - seconds[program, 1]) / STEPS
        rows.append((program, f'{1000 * step:.1f}', f'{1 / step:.1f}', f'{its_bytes / step / 1e9:.1f}',
                     f'{100 * its_bytes / step / bandwidth:.0f} %', f'{1000 * seconds[program, 1]:.0f}'))
    rows.append((f'reading {weight_bytes / 1e9:.2f} GB', f'{1000 * weight_bytes / bandwidth:.1f}', f'{bandwidth / weight_bytes:.1f}',
                 f'{bandwidth / 1e9:.1f}', '100 %', ''))
    header = 'program', 'ms a token', 'tokens/s', 'GB/s', 'of reading', 'ms to the first token'
    table(f'{size}: decoding one prompt', header, rows)


if __name__ == '__main__':
    keep_freed_memory()
    print(f'{" ".join(processor_flags())}, {torch.get_num_threads()} threads', flush=True)
    bandwidth = read_bandwidth()
    for size in sys.argv[1:] or ['small', 'medium']:
        bench_decode(size, bandwidth)
        compare_many(size)
