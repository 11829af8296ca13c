"""
Instruction-tune GPT-2: response-only loss, evaluation, checkpoints. One process, or several under torchrun.

    python train.py config/sft_medium.py
    python train.py config/sft_medium.py --init_from=resume
    torchrun --nproc_per_node=2 train.py config/sft_medium.py
"""
import functools
import json
import math
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

from config import UserError, configure
from files import write_aside, write_json
from lora import add_lora, plain_state, save_adapter
from model import GPT, GPTConfig, start_machine
from prepare import IGNORE, decode, encode_prompt, first_targets, make_batch, read_split

# -----------------------------------------------------------------------------
# run
dataset = 'instruction-data'  # the folder below data/ that prepare.py wrote
out_dir = 'out'  # where everything goes
init_from = 'gpt2-medium'  # 'scratch', 'resume', gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path
weights = 'openai'  # whose files of a GPT-2 name come first: 'openai', 'huggingface'
cache_dir = ''  # where they are kept; empty: gpt2-sft in the user's cache folder
seed = 123
# model
n_layer = 12  # of a model from scratch
n_head = 12  # of a model from scratch
n_embd = 768  # of a model from scratch
block_size = 1024  # of a model from scratch; and the longest packed row
dropout = 0.0
# batch
batch_size = 8  # examples a micro-batch and process
gradient_accumulation_steps = 1  # micro-batches a step
epochs = 1
max_steps = 0  # 0: by epochs
shuffle = True
packing = True  # several examples in a row, which see nothing of each other; the same loss in less time
loss_on = 'answer'  # 'answer', 'response' (its header too), 'all'
# adamw
learning_rate = 5e-5
schedule = 'constant'  # 'constant', 'cosine', 'linear'
warmup_steps = 0
min_lr = 0.0  # where cosine and linear end
weight_decay = 0.1
decay = 'all'  # which parameters decay: 'all', 'matrices'
beta1 = 0.9
beta2 = 0.999
grad_clip = 0.0  # longest gradient; 0: no limit
# lora
lora_rank = 0  # 0: all weights are trained
lora_alpha = 16.0
lora_dropout = 0.0
lora_targets = 'attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj'
quantize = 'none'  # the frozen matrices under LoRA: 'none', 'nf4' (needs bitsandbytes)
# evaluation
eval_interval = 5  # steps
eval_iters = 5  # batches of each split and process; 0: all of it
sample_every_epoch = True  # answer a few val prompts
save_interval = 0  # steps between checkpoints; 0: one an epoch
keep_best = False  # <model>-sft.pth is of the lowest val loss, not of the end
patience = 0  # evaluations without a lower val loss before the run ends; 0: never
# machine
device = 'auto'  # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'  # 'auto' (bfloat16 on cuda, else float32), 'float32', 'bfloat16'
compile = False
shard = False  # several processes: split parameters and optimizer among them (FSDP2)
# -----------------------------------------------------------------------------
config = configure(globals())

device, autocast, rank, world = start_machine(device, dtype)
say = print if rank == 0 else lambda *args: None
for key in ('batch_size', 'gradient_accumulation_steps', 'epochs', 'eval_interval', 'n_layer', 'n_head', 'n_embd'):
    if config[key] < 1:
        raise UserError(f'{key}={config[key]} must be at least 1')
if shard and world == 1:
    raise UserError('shard=True splits a model among processes: start it with torchrun --nproc_per_node=2 train.py ...')

# data
data = {split: read_split(dataset, split) for split in ('train', 'val')}
sources = {split: (meta['sha256'], meta['split_seed']) for split, (_, meta) in data.items()}
if sources['train'] != sources['val']:
    raise UserError(f'train and val of data/{dataset} come from different runs; run: python prepare.py')
for split, (_, meta) in data.items():
    empty = np.flatnonzero(meta['end'] <= first_targets(meta, loss_on))
    if len(empty):
        raise UserError(f'{split} row {empty[0]} of data/{dataset} has no token to learn; run: python prepare.py')
n_rows = len(data['train'][1]['start'])

# what a checkpoint must agree in; the rest may change on the way
AGREE = ('dataset', 'seed', 'batch_size', 'shuffle', 'packing', 'loss_on', 'dropout', 'learning_rate', 'schedule',
         'warmup_steps', 'min_lr', 'weight_decay', 'decay', 'beta1', 'beta2', 'grad_clip', 'lora_rank', 'lora_alpha',
         'lora_dropout', 'lora_targets', 'quantize')
out = Path(out_dir)
last = None  # the checkpoint that is gone on with
if init_from == 'resume':
    try:
        last = torch.load(out / 'ckpt.pt', map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f'no {out}/ckpt.pt to resume: start without --init_from=resume') from error
    except Exception as error:
        raise UserError(f'{out}/ckpt.pt is not a checkpoint ({error}): start without --init_from=resume') from error
    differ = [f'{k} was {last["config"][k]!r}, is {config[k]!r}' for k in AGREE if last['config'][k] != config[k]]
    if last['sha256'] != data['train'][1]['sha256']:
        differ.append(f'the rows of data/{dataset} have changed')
    if differ:
        raise UserError(f'{out}/ckpt.pt is of another run: ' + ', '.join(differ) + '; set them back, or start anew')

# model
torch.manual_seed(seed)
origin = last['config']['init_from'] if last else init_from
if world > 1 and rank > 0:
    dist.barrier()  # rank 0 downloads
if last and not lora_rank:
    model = GPT(GPTConfig(**last['model_config']))
elif origin == 'scratch':
    model = GPT(GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout))
else:
    model = GPT.from_pretrained(origin, cache_dir=cache_dir, prefer=weights, dropout=dropout)
if world > 1 and rank == 0:
    dist.barrier()
block_size = min(block_size, model.config.block_size)
longest = max((meta['end'] - meta['start']).max() for _, meta in data.values())
if longest - 1 > block_size:
    raise UserError(f'data/{dataset} has rows of {longest} tokens, block_size is {block_size}; run: '
                    f'python prepare.py --block_size={block_size}')
if model.config.vocab_size < data['train'][1]['vocab_size']:
    raise UserError(f'{origin} knows {model.config.vocab_size} tokens, data/{dataset} uses {data["train"][1]["vocab_size"]}')
if lora_rank:
    add_lora(model, lora_rank, lora_alpha, lora_dropout, lora_targets, quantize)
elif quantize != 'none':
    raise UserError(f'quantize={quantize!r} freezes the matrices, so it needs LoRA: add --lora_rank=16')
model.to(device)
params = [p for p in model.parameters() if p.requires_grad]
say(f'{model.config.name}: {sum(p.numel() for p in model.parameters()):,} parameters, '
    f'{sum(p.numel() for p in params):,} of them trained, on {device}')
name = f'{model.config.name}-sft'
if compile:
    model.compile(dynamic=True)  # in place, so that the names of the parameters stay
net = model
if shard:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for part in (*model.h, model):
        fully_shard(part)
    register_fsdp_forward_method(model, 'generate')
elif world > 1:
    net = torch.nn.parallel.DistributedDataParallel(model)

# optimizer
params = [p for p in model.parameters() if p.requires_grad]
if decay == 'all':
    groups = [{'params': params}]
elif decay == 'matrices':
    groups = [{'params': [p for p in params if p.dim() > 1]}, {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
else:
    raise UserError(f"decay={decay!r} is none of 'all', 'matrices'")
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)

# where we are
step, seen, best, waited = 0, 0, math.inf, 0  # seen: examples since the start; waited: evaluations without a new best
whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=not lora_rank)
if last:
    set_state_dict(model, optimizer, model_state_dict=last['model'], optim_state_dict=last['optimizer'], options=whole)
    step, seen, best, waited = last['step'], last['seen'], last['best'], last['waited']
    del last
rows_a_step = batch_size * gradient_accumulation_steps * world
epoch, place = divmod(seen, n_rows)
first = step
steps = max_steps or step + math.ceil((n_rows - place) / rows_a_step) + (epochs - epoch - 1) * math.ceil(n_rows / rows_a_step)


@functools.lru_cache(1)
def epoch_order(epoch):
    """Row numbers in the order in which this epoch takes them."""
    return np.random.default_rng((seed, epoch)).permutation(n_rows) if shuffle else np.arange(n_rows)


def get_batch(split, numbers):
    """-> ids, targets, positions, segments on the device. No rows: row 0 with nothing supervised, to keep in step."""
    x, y, positions, segments = make_batch(data[split], numbers if len(numbers) else [0], packing, loss_on, block_size)
    if not len(numbers):
        y[:] = IGNORE
    return [torch.from_numpy(a).to(device) for a in (x, y, positions, segments)[:4 if packing else 3]]


def n_supervised(split, numbers):
    meta = data[split][1]
    return int((meta['end'] - first_targets(meta, loss_on))[numbers].sum())


def sum_over_processes(*values):
    total = torch.tensor(values, dtype=torch.float64, device=device if device.type == 'cuda' else 'cpu')
    if world > 1:
        dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def estimate_loss(split):
    """The loss a supervised token over eval_iters batches that are the same every time, shared out among processes."""
    model.eval()
    numbers = np.random.default_rng(seed).permutation(len(data[split][1]['start']))
    numbers = numbers[:eval_iters * batch_size * world or None]
    chunks = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    chunks += [numbers[:0]] * (-len(chunks) % world)  # as many for each process
    total = 0.0
    for chunk in chunks[rank::world]:
        with autocast:
            total += model(*get_batch(split, chunk), denominator=1)[1].item()
    model.train()
    return sum_over_processes(total)[0] / n_supervised(split, numbers)


def get_lr(step):
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == 'constant':
        return learning_rate
    elif schedule == 'linear':
        return learning_rate + done * (min_lr - learning_rate)
    elif schedule == 'cosine':
        return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)
    raise UserError(f"schedule={schedule!r} is none of 'constant', 'cosine', 'linear'")


def show_answers():
    """Answer three val prompts and print the answers beside the references."""
    rows = data['val'][1]['rows'][:3]
    with autocast:
        answers = model.generate([encode_prompt(row) for row in rows], max_new_tokens=50)
    for row, answer in zip(rows, answers):
        say(f'  {row["instruction"]}  {row.get("input") or ""}\n    reference: {row["output"]}\n    answer:    {decode(answer)}')


def save_checkpoint():
    state, optimizer_state = get_state_dict(model, optimizer, options=whole)
    state = {'model': state, 'optimizer': optimizer_state, 'step': step, 'seen': seen, 'best': best, 'waited': waited,
             'config': {**config, 'init_from': origin}, 'model_config': asdict(model.config), 'sha256': data['train'][1]['sha256']}
    if rank == 0:
        write_aside(out / 'ckpt.pt', lambda file: torch.save(state, file), 'wb')


def save_model():
    """The plain state dict, LoRA merged into it, and what made it; the adapter alone beside it."""
    state = plain_state(model)
    if rank == 0:
        write_aside(out / f'{name}.pth', lambda file: torch.save(state, file), 'wb')
        write_json(out / f'{name}.json', {'model': asdict(model.config), 'step': step, 'val_loss': val_loss, 'init_from': origin,
                                          'config': config, 'sha256': data['train'][1]['sha256']})
        if lora_rank:
            save_adapter(model, out / 'adapter.safetensors', {'init_from': origin, 'step': step})


def record(**fields):
    if rank == 0:
        log.write(json.dumps(fields) + '\n')
        log.flush()


def draw_curves():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say('loss.png is not drawn: pip install matplotlib')
    records = [json.loads(line) for line in open(out / 'log.jsonl')]
    axes = (figure := Figure(figsize=(7, 4), layout='constrained')).subplots()
    for key, style in {'loss': '-', 'train_loss': 'o-', 'val_loss': 'o-'}.items():
        points = [(r['step'], r[key]) for r in records if key in r]
        axes.plot(*zip(*points), style, label=key, markersize=3, alpha=0.4 if key == 'loss' else 1.0)
    axes.set(xlabel='step', ylabel='nats a supervised token', title=name)
    axes.legend()
    write_aside(out / 'loss.png', lambda file: figure.savefig(file, format='png', dpi=150), 'wb')


# the log goes on behind the checkpoint; what an interrupted run wrote after it comes again
out.mkdir(parents=True, exist_ok=True)
kept = []
if step and (out / 'log.jsonl').exists():
    kept = [line for line in open(out / 'log.jsonl') if json.loads(line)['step'] <= step]
if rank == 0:
    write_aside(out / 'log.jsonl', lambda file: file.writelines(kept))
    log = open(out / 'log.jsonl', 'a')

# Ctrl-C (and a scheduler's SIGTERM) ends the run after the step at hand, saved; a second one ends it at once
stop = False


def stop_after_this_step(number, frame):
    global stop
    stop = True
    signal.signal(number, signal.SIG_DFL)


signal.signal(signal.SIGINT, stop_after_this_step)
signal.signal(signal.SIGTERM, stop_after_this_step)

say(f'{n_rows} rows, {rows_a_step} a step, steps {step} to {steps}')
bar = tqdm(total=steps, initial=step, unit='step', disable=None if rank == 0 else True)
say = bar.write if not bar.disable else say
model.train()
val_loss, saved = math.nan, step
while True:
    last_step = step >= steps or stop
    new_epoch = seen and seen % n_rows == 0 and step > first
    # a resumed run evaluated here before it stopped
    if (step % eval_interval == 0 or last_step) and not stop and (step > first or not step):
        train_loss, val_loss = estimate_loss('train'), estimate_loss('val')
        say(f'step {step}/{steps} | train loss {train_loss:.4f} | val loss {val_loss:.4f}')
        record(step=step, train_loss=train_loss, val_loss=val_loss)
        waited = 0 if val_loss < best else waited + 1
        if step and val_loss < best:
            best = val_loss
            if keep_best:
                save_model()
        if patience and waited >= patience:
            say(f'no lower val loss in {patience} evaluations: the run ends')
            last_step = True
    if new_epoch and sample_every_epoch:
        show_answers()
    if (last_step or (step % save_interval == 0 if save_interval else new_epoch)) and step > saved:
        save_checkpoint()
        saved = step
    if last_step:
        break
    # one update: the loss is the sum over the supervised tokens of all micro-batches and processes, divided by their number
    began = time.perf_counter()
    torch.manual_seed(hash((seed, step, rank)))  # dropout; so that a resumed run draws what the unbroken one does
    for group in optimizer.param_groups:
        group['lr'] = get_lr(step)
    epoch, place = divmod(seen, n_rows)
    numbers = epoch_order(epoch)[place:place + rows_a_step]
    supervised = n_supervised('train', numbers)
    chunks = np.array_split(numbers, gradient_accumulation_steps * world)[rank::world]
    loss = 0.0
    for i, chunk in enumerate(chunks):
        is_last = i == len(chunks) - 1  # processes exchange gradients once a step
        if shard:
            model.set_requires_gradient_sync(is_last)
        elif world > 1:
            net.require_backward_grad_sync = is_last
        with autocast:
            part = net(*get_batch('train', chunk), denominator=supervised)[1]
        (part * world).backward()  # torch averages over processes; the sum is wanted
        loss += part.item()
    loss, stops = sum_over_processes(loss, stop)
    stop = stops > 0
    gradients = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if shard else norm
    if not math.isfinite(loss) or not norm.isfinite():
        bar.close()
        raise UserError(f'step {step + 1}: loss {loss}, gradient norm {norm.item()}; the checkpoint of step {saved} is kept; '
                        'lower learning_rate, set grad_clip, or go back to it with --init_from=resume')
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    optimizer.step()
    optimizer.zero_grad()
    step, seen = step + 1, seen + len(numbers)
    # the log
    seconds = time.perf_counter() - began
    tokens = int((data['train'][1]['end'] - data['train'][1]['start'])[numbers].sum())
    record(step=step, loss=loss, lr=optimizer.param_groups[0]['lr'], supervised_tokens=supervised, tokens=tokens,
           seconds=seconds, grad_norm=norm.item())
    bar.set_postfix_str(f'loss {loss:.3f}, {tokens / seconds:.0f} tokens/s', refresh=False)
    bar.update()
    if bar.disable:
        say(f'step {step}/{steps} | loss {loss:.4f} | lr {get_lr(step - 1):.2e} | norm {norm.item():.2f} | '
            f'{tokens / seconds:.0f} tokens/s | {seconds * 1000:.0f} ms')
bar.close()

if not keep_best or best == math.inf:
    save_model()
if rank == 0:
    draw_curves()
say(f'{"stopped at" if stop else "finished"} step {step}; wrote {out}/: ckpt.pt, {name}.pth, {name}.json, log.jsonl, loss.png')
if world > 1:
    dist.destroy_process_group()
