"""
The list for a GPU: is everything right there, and how fast is it? Random weights of Small and Medium, no network, ten minutes at most.

    python tests/gpu.py                                   # prints a table; writes out/gpu/gpu.json and out/gpu/gpu.md
    python tests/gpu.py --only=losses,resume
    python tests/gpu.py --device=cpu --small=tiny --medium=tiny      # tries the list itself

Checks compare the device with this machine's CPU, or a run with another one; figures have transformers and TRL beside them where
they are installed. The exit status is 1 if a check fails.
"""
import argparse
import contextlib
import gc
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from engine import for_inference, generate  # noqa: E402
from prepare import encode_prompt, make_batch, read_split  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench import SHAPES, as_transformers, build, peer_generate, table, trl  # noqa: E402

DTYPES = 'float32', 'bfloat16', 'float16'
HALF = 'bfloat16', 'float16'


# --- what the checks and figures share


def make_rows(count):
    """Rows of random words, of many lengths, with and without an input."""
    draw = random.Random(0)
    words = 'the a of red tree house river walks sings stone bright old number seven write under answer cloud'.split()
    rows = []
    for i in range(count):
        row = {'instruction': ' '.join(draw.choices(words, k=draw.randint(4, 30))) + f' {i}.'}
        row['input'] = ' '.join(draw.choices(words, k=draw.randint(1, 30))) if i % 2 else ''
        row['output'] = ' '.join(draw.choices(words, k=draw.randint(1, 40))) + '.'
        rows.append(row)
    return rows


def run_stage(folder, *command):
    """Run a stage in a process of its own: what it prints, at the end the most memory of the device, in bytes."""
    process = subprocess.run([sys.executable, __file__, 'stage', *command], cwd=folder, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f'{" ".join(map(str, command))}: {process.stderr.strip()[-500:]}')
    return process.stdout


def train(args, size, out, *flags, steps=0, device=''):
    """Train a model of random weights: (losses, median seconds and tokens a second of the second half, peak bytes of the device)."""
    n_layer, n_head, n_embd = SHAPES[size]
    printed = run_stage(
        args.folder, ROOT / 'train.py', '--init_from=scratch', f'--n_layer={n_layer}', f'--n_head={n_head}', f'--n_embd={n_embd}',
        '--dataset=gpu', f'--out_dir={out}', f'--device={device or args.device}', '--dtype=float32', f'--max_steps={steps or args.steps}', f'--batch_size={args.rows}',
        '--learning_rate=3e-4', '--eval_interval=1000', '--eval_iters=1', '--sample_every_epoch=False', *flags)
    records = [json.loads(line) for line in (args.folder / out / 'log.jsonl').read_text().splitlines()]
    steps = [record for record in records if 'loss' in record]
    timed = steps[len(steps) // 2:]
    seconds = statistics.median(record['seconds'] for record in timed)
    speed = statistics.median(record['tokens'] / record['seconds'] for record in timed)
    return [record['loss'] for record in steps], seconds, speed, int(printed.rpartition('peak ')[2])


def fp32_losses(args):
    """The losses of the run that others are compared with, which lies in the folder fp32."""
    if not args.fp32_losses:
        args.fp32_losses, *_ = train(args, args.small, 'fp32')
    return args.fp32_losses


def largest_difference(losses, others):
    """Relative to the losses; of two runs of different lengths the shorter one counts."""
    return max(abs(a - b) / abs(a) for a, b in zip(losses, others))


def prompts_of(count):
    return [encode_prompt(row) for row in make_rows(count)]


def share_equal(answers, others):
    """The share of ids that are equal in two lists of answers."""
    pairs = [pair for a, b in zip(answers, others) for pair in zip(a, b)]
    return sum(a == b for a, b in pairs) / len(pairs)


def confident_model(size):
    """Random weights so large that answers depend on the whole prompt, and the likeliest id is far above the next."""
    model = build(size)
    for p in model.h.parameters():
        p.data *= 8 if p.dim() == 2 else 1
    return model


def synchronize(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def timed(function, device):
    """(seconds until the function returns, seconds until the device has done its work)."""
    synchronize(device)
    began = time.perf_counter()
    function()
    returned = time.perf_counter()
    synchronize(device)
    return returned - began, time.perf_counter() - began


# --- checks: each yields (what, value, whether it is right)


def check_losses(args):
    """Twenty steps of training in fp32, on the device and on the CPU."""
    expected, *_ = train(args, args.small, 'fp32-cpu', device='cpu')
    difference = largest_difference(fp32_losses(args), expected)
    yield f'losses of {args.steps} steps in fp32, largest relative difference to the CPU', f'{difference:.1e}', difference < 1e-4


def check_half(args):
    """Half precision trains: float16 with its GradScaler."""
    for dtype in HALF:
        losses, *_ = train(args, args.small, dtype, f'--dtype={dtype}')
        yield f'training in {dtype}, first and last loss', f'{losses[0]:.3f}, {losses[-1]:.3f}', losses[-1] < losses[0]


def check_lora(args):
    losses, *_ = train(args, args.small, 'lora', '--lora_rank=16', '--learning_rate=3e-3', '--grad_clip=0.0')
    yield 'LoRA without clipping, first and last loss', f'{losses[0]:.3f}, {losses[-1]:.3f}', losses[-1] < losses[0]


def check_packing(args):
    padded, *_ = train(args, args.small, 'padded', '--packing=False', steps=5)
    difference = largest_difference(fp32_losses(args), padded)
    yield 'losses packed and padded, largest relative difference', f'{difference:.1e}', difference < 1e-4


def check_resume(args):
    whole, *_ = train(args, args.small, 'whole', '--dropout=0.1')
    train(args, args.small, 'resumed', '--dropout=0.1', steps=args.steps // 2)
    resumed, *_ = train(args, args.small, 'resumed', '--dropout=0.1', '--init_from=resume')
    difference = largest_difference(whole, resumed)
    yield 'losses of a resumed run, largest relative difference to the unbroken one', f'{difference:.1e}', difference < 1e-4


def check_compile(args):
    compiled, *_ = train(args, args.small, 'compiled', '--compile=True', steps=5)
    difference = largest_difference(fp32_losses(args), compiled)
    yield 'losses compiled, largest relative difference', f'{difference:.1e}', difference < 1e-4


def check_generation(args):
    """Ragged prompts against the CPU in fp32: in fp32 all ids, in half precision the first, since one that differs changes all behind it."""
    prompts = prompts_of(args.prompts)
    expected = generate(for_inference(confident_model(args.small), torch.device('cpu'), torch.float32), prompts, 16, eos=-1)
    for dtype in DTYPES:
        model = for_inference(confident_model(args.small), torch.device(args.device), getattr(torch, dtype))
        answers = generate(model, prompts, 16, eos=-1)
        is_whole = [len(ids) for ids in answers] == [16] * len(prompts)
        n_compared = 16 if dtype == 'float32' else 1
        share = share_equal([ids[:n_compared] for ids in expected], answers)
        at_least = 0.999 if dtype == 'float32' else 0.8
        what = f'{len(prompts)} ragged prompts in {dtype}, share of the first {n_compared} greedy ids equal to the CPU in fp32'
        yield what, f'{share:.4f}', is_whole and share >= at_least


def start_server(folder, *flags):
    """serve.py upon a run: its address, and the process."""
    process = subprocess.Popen([sys.executable, ROOT / 'serve.py', '--port=0', *flags], cwd=folder, text=True, stdout=subprocess.PIPE)
    for line in process.stdout:
        if ': http://' in line:
            return line.split()[-1], process
    raise RuntimeError(f'serve.py ended with {process.wait()}')


def check_serve(args):
    """Many clients at once get what each gets alone."""
    fp32_losses(args)
    rows = make_rows(args.clients)
    address, process = start_server(args.folder, '--out_dir=fp32', '--before=False', f'--device={args.device}', '--dtype=float32')

    def ask(row):
        message = {'role': 'user', 'content': row['instruction']}
        body = {'messages': [message], 'input': row['input'], 'max_tokens': 16, 'temperature': 0}
        request = Request(address + '/v1/chat/completions', json.dumps(body).encode(), {'Content-Type': 'application/json'})
        with urlopen(request, timeout=120) as reply:
            return json.load(reply)['choices'][0]['message']['content']

    try:
        alone = [ask(row) for row in rows]
        with ThreadPoolExecutor(args.clients) as pool:
            began = time.perf_counter()
            together = list(pool.map(ask, rows))
            seconds = time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
    n_equal = sum(a == b for a, b in zip(alone, together))
    yield (f'serve.py, {args.clients} clients at once, answers equal to those alone', f'{n_equal} of {len(rows)} in {seconds:.1f} s',
           n_equal >= 0.9 * len(rows))


# --- figures: each yields (what, value, None)


def measure_steps(args):
    for dtype in 'float32', 'bfloat16':
        for form, flags in ('packed', ()), ('padded', ('--packing=False',)):
            _, seconds, speed, peak = train(args, args.medium, 'steps', f'--dtype={dtype}', *flags)
            yield f'a step of {args.medium}, {args.rows} rows, {dtype}, {form}', f'{1000 * seconds:.0f} ms, {speed:.0f} tokens/s, peak {peak / 1e9:.1f} GB', None
    if find_spec('trl'):
        with contextlib.chdir(args.folder):
            split = read_split('gpu', 'train')
        for dtype in 'float32', 'bfloat16':
            seconds = statistics.median(trl(args.medium, split, 9, args.device, bf16=dtype == 'bfloat16')[3:])
            yield f'TRL SFTTrainer: a step of {args.medium}, 8 rows, {dtype}', f'{1000 * seconds:.0f} ms', None


def measure_generation(args):
    for dtype in 'float32', 'bfloat16':
        model = for_inference(build(args.medium), torch.device(args.device), getattr(torch, dtype))
        for count in 1, args.prompts:
            prompts = prompts_of(count)
            generate(model, prompts, 4, eos=-1)  # warm
            _, seconds = timed(lambda model=model, prompts=prompts: generate(model, prompts, 24, eos=-1), args.device)
            yield f'{args.medium}, {count} prompts at once, 24 new tokens, {dtype}', f'{24 * count / seconds:.0f} tokens/s', None
    if find_spec('transformers'):
        for dtype in 'float32', 'bfloat16':
            theirs = as_transformers(build(args.medium)).to(args.device, getattr(torch, dtype))
            for count in 1, args.prompts:
                prompts = prompts_of(count)
                peer_generate(theirs, prompts, 4, count)
                _, seconds = timed(lambda theirs=theirs, prompts=prompts: peer_generate(theirs, prompts, 24, len(prompts)), args.device)
                yield f'transformers: {args.medium}, {count} prompts at once, {dtype}', f'{24 * count / seconds:.0f} tokens/s', None


def measure_host_time(args):
    """How long the host takes to ask for a step, and the device to compute it."""
    model = build(args.medium).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    with contextlib.chdir(args.folder):
        batch = make_batch(read_split('gpu', 'train'), np.arange(args.rows))
    batch = [torch.from_numpy(array).to(args.device) for array in batch]

    def step():
        with torch.autocast(args.device, torch.bfloat16):
            model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    times = [timed(step, args.device) for _ in range(5)]
    host = statistics.median(host for host, _ in times)
    whole = statistics.median(whole for _, whole in times)
    with torch.profiler.profile() as profile:
        step()
        synchronize(args.device)
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e3
    yield (f'a step of {args.medium} in bfloat16: the host returns after, the step ends after, the device is busy',
           f'{1000 * host:.0f} ms, {1000 * whole:.0f} ms, {busy:.0f} ms', None)


PARTS = {'losses': check_losses, 'half': check_half, 'lora': check_lora, 'packing': check_packing, 'resume': check_resume,
         'compile': check_compile, 'generation': check_generation, 'serve': check_serve, 'steps': measure_steps,
         'speed': measure_generation, 'host': measure_host_time}


# --- start


def run_part(args, name):
    """[(part, what, value, 'yes', 'NO' or '')]; what raises an error is a line, too, and the others go on."""
    rows = []
    try:
        for what, value, is_right in PARTS[name](args):
            rows.append((name, what, value, {True: 'yes', False: 'NO', None: ''}[is_right]))
    except Exception as error:
        traceback.print_exc()
        rows.append((name, 'it ended with an error', f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}', 'NO'))
    gc.collect()
    if args.device == 'cuda':
        torch.cuda.empty_cache()
    return rows


def read_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default=','.join(PARTS), help='parts, with commas: ' + ', '.join(PARTS))
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--small', default='small', choices=SHAPES, help='the shape of the checks')
    parser.add_argument('--medium', default='medium', choices=SHAPES, help='the shape of the figures')
    parser.add_argument('--steps', type=int, default=20, help='of a training')
    parser.add_argument('--rows', type=int, default=8, help='of a step')
    parser.add_argument('--prompts', type=int, default=110)
    parser.add_argument('--clients', type=int, default=32)
    parser.add_argument('--out', type=Path, default=ROOT / 'out/gpu')
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    args.fp32_losses = []
    return args


def main(arguments=None):
    """Run the parts, write both files, and return the exit status."""
    args = read_arguments(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        print('there is no GPU that torch can use: the list for it is skipped')
        return 0
    machine = torch.cuda.get_device_name() if args.device == 'cuda' else platform.processor() or platform.machine()
    machine = f'{machine}, torch {torch.__version__}, Python {platform.python_version()}'
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        (args.folder / 'rows.json').write_text(json.dumps(make_rows(400)))
        run_stage(args.folder, ROOT / 'prepare.py', '--source=rows.json', '--dataset=gpu')
        for name in args.only.split(','):
            began = time.perf_counter()
            rows += run_part(args, name)
            print(f'{name}: {time.perf_counter() - began:.0f} s', *(row[1:] for row in rows if row[0] == name), sep='\n  ', flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'gpu.json').write_text(json.dumps({'machine': machine, 'rows': rows}, indent=1))
    with open(args.out / 'gpu.md', 'w') as file, contextlib.redirect_stdout(file):
        table(machine, ('part', 'what', 'value', 'right'), rows)
    print((args.out / 'gpu.md').read_text())
    return int(any(row[3] == 'NO' for row in rows))


def run_as_stage(command):
    """In a process of its own: a stage as a user runs it, then the most memory of the device, or on a CPU of the process."""
    import runpy
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name='__main__')
    if torch.cuda.is_available():
        print('peak', torch.cuda.max_memory_allocated())
    else:
        status = Path('/proc/self/status')
        found = re.search(r'VmHWM:\s+(\d+) kB', status.read_text()) if status.exists() else None
        print('peak', int(found[1]) * 1024 if found else 0)


if __name__ == '__main__':
    if sys.argv[1:2] == ['stage']:
        run_as_stage(sys.argv[2:])
    else:
        sys.exit(main())
