"""
One prompt at a time: how near a decode step comes to what reading the weights once takes.

    python tests/bench_decode.py            # Small and Medium; other sizes as arguments

A step's time is that of 33 new tokens less that of one, over 32; programs take turns, medians of five. transformers and llama.cpp take
part where they are installed; what needs a processor with bfloat16 is left out by name on others.
"""
import contextlib
import io
import operator
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import torch  # noqa: E402
from bench import build, processor_flags, race, read_data, table, test_prompts  # noqa: E402
from bench_export import write_run  # noqa: E402

from config import UserError, keep_freed_memory  # noqa: E402
from export import open_exported  # noqa: E402
from lora import for_inference  # noqa: E402
from prepare import encode_prompt  # noqa: E402

ROW = {'instruction': 'Rewrite the sentence in the passive voice.', 'input': 'The girl kicked the ball.'}
STEPS = 32


def read_bandwidth():
    """-> bytes a second of a sum over 1 GB, which no cache holds."""
    numbers, seconds = torch.ones(250_000_000), []
    for _ in range(7):
        began = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began)
    return 1e9 / statistics.median(seconds)


def export_step(folder, name, *flags):
    """-> the model that a peer reads from export.py's files of the run in folder, or None where it is not installed."""
    command = [sys.executable, ROOT / 'export.py', f'--out_dir={folder}', f'--to={name}', '--dataset=absent', *flags]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    from model import GPT
    model = GPT.from_pretrained(folder)
    with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
        return open_exported(name, Path(folder, 'export', name), model.config, '', '')[0]


@torch.inference_mode()
def bench_decode(sizes):
    """A row for each program that decodes a model of each size."""
    keep_freed_memory()
    flags, prompt, rows = processor_flags(), encode_prompt(ROW), []
    for size in sizes:
        read, model = read_bandwidth(), build(size).eval()
        weight_bytes = 4 * sum(p.numel() for name, p in model.named_parameters() if name != 'wpe.weight')
        programs = {'model.py, fp32': (model, weight_bytes)}
        place, _ = for_inference(torch.device('cpu'), torch.float16)
        programs['model.py, float16'] = place(build(size)), weight_bytes / 2
        if {'avx512_bf16', 'amx_bf16'} & set(flags):
            programs['model.py, all in bfloat16'] = build(size).bfloat16().eval(), weight_bytes / 2
        else:
            print('bfloat16 is left out: the processor has neither avx512_bf16 nor amx_bf16')
        with tempfile.TemporaryDirectory() as folder:
            write_run(Path(folder), size)
            for name, *more, share in (('huggingface', 1), ('gguf', 1), ('gguf', '--gguf_type=F16', 2)):
                if one := export_step(folder, name, *more):
                    form = 'F16' if more else 'fp32'
                    programs[f'{one.program}, {form}'] = one, weight_bytes / share
            calls = {(program, n): lambda one=one, n=n: one.generate([prompt], n, eos=-1)
                     for program, (one, _) in programs.items() for n in (1, STEPS + 1)}
            seconds = race(calls, 5)
            many = test_prompts(read_data('instruction-data')[1])
            answers = {}
            took = race({name: lambda name=name: answers.update({name: [
                id for ids in programs[f'model.py, {name}'][0].generate(many, 24, eos=-1) for id in ids]}) for name in ('fp32', 'float16')}, 1)
            equal = sum(map(operator.eq, *answers.values())) / len(answers['fp32'])
            print(f'{size}: {len(many)} prompts, 24 new tokens each: {took["fp32"]:.2f} s, in float16 {took["float16"]:.2f} s, '
                  f'{100 * equal:.2f} % of greedy ids equal')
        for program, (_, its_bytes) in programs.items():
            step = (seconds[program, STEPS + 1] - seconds[program, 1]) / STEPS
            rows.append((size, program, f'{1000 * step:.1f}', f'{1 / step:.1f}', f'{its_bytes / step / 1e9:.1f}',
                         f'{100 * its_bytes / step / read:.0f} %', f'{1000 * seconds[program, 1]:.0f}'))
        rows.append((size, f'reading {weight_bytes / 1e9:.2f} GB', f'{1000 * weight_bytes / read:.1f}', f'{read / weight_bytes:.1f}',
                     f'{read / 1e9:.1f}', '100 %', ''))
    table('decoding one prompt', ('model', 'program', 'ms a token', 'tokens/s', 'GB/s', 'of reading', 'ms to the first token'), rows)


if __name__ == '__main__':
    print(f'{" ".join(processor_flags())}, {torch.get_num_threads()} threads', flush=True)
    bench_decode(sys.argv[1:] or ['small', 'medium'])
