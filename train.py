"""
Instruction-tune GPT-2: response-only loss, evaluation, checkpoints. One process, or several under torchrun.

    python train.py config/sft_medium.py
    python train.py config/sft_medium.py --init_from=resume
    torchrun --nproc_per_node=2 train.py config/sft_medium.py
"""
import json
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # torch puts large tensors in huge pages
import cpu  # noqa: F401 (before torch)
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

from batch import IGNORE, first_targets, make_batch
from config import UserError, configure
from files import write_aside, write_json
from lora import add_lora, plain_state, save_adapter
from model import GPT, GPTConfig, start_machine
from prepare import decode, encode_prompt, read_split
from report import draw_curves

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
out = Path(out_dir)
for key in ('batch_size', 'gradient_accumulation_steps', 'epochs', 'eval_interval', 'n_layer', 'n_head', 'n_embd'):
    if config[key] < 1:
        raise UserError(f'{key}={config[key]} must be at least 1')
for key, choices in {'schedule': ('constant', 'cosine', 'linear'), 'decay': ('all', 'matrices')}.items():
    if config[key] not in choices:
        raise UserError(f'{key}={config[key]!r} is none of {", ".join(choices)}')
shard = shard and world > 1  # one process has nobody to share with

# data
data = {split: read_split(dataset, split) for split in ('train', 'val')}
rows = data['train'][1]
length, supervised = rows['end'] - rows['start'], rows['end'] - first_targets(rows, loss_on)
longest = max(length.max(), (data['val'][1]['end'] - data['val'][1]['start']).max())
if rows['sha256'] != data['val'][1]['sha256']:
    raise UserError(f'train and val of data/{dataset} come from different rows; run: python prepare.py')

# a checkpoint to go on with must agree in all that shapes the weights; this may change on the way
FREE = ('init_from out_dir weights cache_dir gradient_accumulation_steps epochs max_steps eval_interval eval_iters '
        'sample_every_epoch save_interval keep_best patience device compile shard').split()
last = None
if init_from == 'resume':
    try:
        last = torch.load(out / 'ckpt.pt', map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # torch.load tells of no error in particular
        why = str(error).splitlines()[0]
        raise UserError(f'cannot resume from {out}/ckpt.pt ({why}): start without --init_from=resume') from error
    was = last['config'] | {'rows': last['sha256']}
    differ = [f'{key} was {was.get(key)!r}, is {value!r}' for key, value in (config | {'rows': rows['sha256']}).items()
              if key not in FREE and value != was.get(key)]
    if differ:
        raise UserError(f'{out}/ckpt.pt is of another run: {", ".join(differ)}; set them back, or start without resume')
origin = last['config']['init_from'] if last else init_from

# model
torch.manual_seed(seed)
if world > 1 and rank > 0:
    dist.barrier()  # until rank 0 has downloaded
if last and not lora_rank:
    model = GPT(GPTConfig(**last['model_config']))  # its weights come from the checkpoint
elif origin == 'scratch':
    model = GPT(GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout))
else:
    model = GPT.from_pretrained(origin, cache_dir=cache_dir, weights=weights, dropout=dropout)
if world > 1 and rank == 0:
    dist.barrier()
name = f'{model.config.name}-sft'
block_size = min(block_size, model.config.block_size)
if longest > block_size + 1:
    raise UserError(f'data/{dataset} has a row of {longest} tokens; run: python prepare.py --block_size={block_size}')
if model.config.vocab_size < rows['vocab_size']:
    raise UserError(f'{origin} knows {model.config.vocab_size} tokens, data/{dataset} is written in {rows["vocab_size"]}')
if lora_rank:
    add_lora(model, lora_rank, lora_alpha, lora_dropout, lora_targets, quantize)
elif quantize != 'none':
    raise UserError(f'quantize={quantize!r} freezes the matrices, so it needs LoRA: add --lora_rank=16')
net = model.to(device)
say(f'{model.config.name} on {device}: {sum(p.numel() for p in model.parameters()):,} parameters, '
    f'{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of them trained')
if compile:
    model.compile(dynamic=True)  # in place: the names of the parameters stay
if shard:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for part in (*model.h, model):
        fully_shard(part)
    register_fsdp_forward_method(model, 'generate')
elif world > 1:
    net = torch.nn.parallel.DistributedDataParallel(model)

# optimizer
params = [p for p in model.parameters() if p.requires_grad]
groups = [{'params': params}]
if decay == 'matrices':
    groups = [{'params': [p for p in params if p.dim() > 1]},
              {'params': [p for p in params if p.dim() == 1], 'weight_decay': 0.0}]
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
norms = []  # of the gradients of a step


def update(*_):
    """AdamW for the gradients that are there, and frees them. Their norm by rows: of a whole tensor, torch's is 1e-4 off."""
    row_norms = [torch.linalg.vector_norm(p.grad, dim=-1) for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(row_norms)
    norms.append(norm.full_tensor() if shard else norm)
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norms[0])
    optimizer.step()
    optimizer.zero_grad()


# where nothing needs all gradients at once, a block is updated as soon as backward is through it, which frees its own.
# No parameter may be used twice in a forward, or half a gradient updates it; of wte's two TiedEmbedding makes one
if world == gradient_accumulation_steps == 1 and not grad_clip:
    for block in model.h:
        next(p for p in block.parameters() if p.requires_grad).register_post_accumulate_grad_hook(update)

# where the run is: updates done, examples seen, the lowest val loss, evaluations since it, the last evaluation
at = {'step': 0, 'seen': 0, 'best': math.inf, 'waited': 0, 'val_loss': math.nan}
whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=not lora_rank)
if last:
    set_state_dict(model, optimizer, model_state_dict=last['model'], optim_state_dict=last['optimizer'], options=whole)
    at = last['at']
    del last
step = first = at['step']
rows_a_step = batch_size * gradient_accumulation_steps * world
epoch, place = divmod(at['seen'], len(length))
steps = max_steps or (step + math.ceil((len(length) - place) / rows_a_step)
                      + (epochs - epoch - 1) * math.ceil(len(length) / rows_a_step))


def get_batch(split, numbers):
    """-> ids, targets, positions, segments on the device. No rows: row 0 with nothing supervised, to keep in step."""
    batch = make_batch(data[split], numbers if len(numbers) else [0], packing, loss_on, block_size)
    if not len(numbers):
        batch[1][:] = IGNORE
    return [torch.from_numpy(array).to(device) for array in batch[:4 if packing else 3]]


def sum_over_processes(*values):
    total = torch.tensor(values, device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64)
    if world > 1:
        dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def estimate_loss(split):
    """-> nats a supervised token over eval_iters batches, the same ones every time, shared out among processes."""
    model.eval()
    meta = data[split][1]
    numbers = np.random.default_rng(abs(seed)).permutation(len(meta['start']))[:eval_iters * batch_size * world or None]
    chunks = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    chunks += [numbers[:0]] * (-len(chunks) % world)  # as many for each process
    with autocast:
        total = sum(model(*get_batch(split, chunk), denominator=1)[1].item() for chunk in chunks[rank::world])
    model.train()
    return sum_over_processes(total)[0] / (meta['end'] - first_targets(meta, loss_on))[numbers].sum().item()


def get_lr(step):
    done = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
    left = {'constant': 1.0, 'linear': 1 - done, 'cosine': 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return (min_lr + left * (learning_rate - min_lr)) * min(1, (step + 1) / max(1, warmup_steps))


def show_answers():
    """Answer three val prompts and print the answers beside the references."""
    shown = data['val'][1]['rows'][:3]
    with autocast:
        answers = model.generate([encode_prompt(row) for row in shown], max_new_tokens=50)
    for row, answer in zip(shown, answers):
        say(f'  {row["instruction"]}  {row.get("input") or ""}')
        say(f'    reference: {row["output"]}\n    answer:    {decode(answer)}')


def save_checkpoint():
    state, moments = get_state_dict(model, optimizer, options=whole)
    state = {'model': state, 'optimizer': moments, 'at': at, 'config': config | {'init_from': origin},
             'model_config': asdict(model.config), 'sha256': rows['sha256']}
    if rank == 0:
        write_aside(out / 'ckpt.pt', lambda file: torch.save(state, file), 'wb')


def save_model():
    """The plain state dict, LoRA merged into it, and what made it; LoRA's own matrices beside it."""
    state = plain_state(model)
    about = {'model': asdict(model.config), 'init_from': origin, 'sha256': rows['sha256'], **at, 'config': config}
    if lora_rank:
        save_adapter(model, out / 'adapter.safetensors', about, write=rank == 0)
    if rank == 0:
        write_aside(out / f'{name}.pth', lambda file: torch.save(state, file), 'wb')
        write_json(out / f'{name}.json', about)


def record(**fields):
    if rank == 0:
        with open(out / 'log.jsonl', 'a') as file:
            file.write(json.dumps(fields) + '\n')


# the log goes on behind the checkpoint; what an interrupted run wrote after it comes again
if rank == 0:
    lines = open(out / 'log.jsonl').readlines() if first and (out / 'log.jsonl').exists() else []
    write_aside(out / 'log.jsonl', lambda file: file.writelines(x for x in lines if json.loads(x)['step'] <= first))

# Ctrl-C, or a scheduler's SIGTERM, ends the run after the step at hand, saved; a second one ends it at once
asked = []


def ask(number, frame):
    asked.append(number)
    signal.signal(number, signal.SIG_DFL)


signal.signal(signal.SIGINT, ask)
signal.signal(signal.SIGTERM, ask)

say(f'{len(length)} rows, {rows_a_step} a step; from step {first} to {steps}')
bar = tqdm(total=steps, initial=first, unit='step', disable=None if rank == 0 else True)
say = say if bar.disable else bar.write
model.train()
stop = False
while True:
    last_step = step >= steps or stop
    epoch_ended = step > first and at['seen'] % len(length) == 0
    # evaluation, at both ends and between; a resumed run has it behind it
    if (step % eval_interval == 0 or last_step) and not stop and (step > first or step == 0):
        train_loss, at['val_loss'] = estimate_loss('train'), estimate_loss('val')
        say(f'step {step}/{steps} | train loss {train_loss:.4f} | val loss {at["val_loss"]:.4f}')
        record(step=step, train_loss=train_loss, val_loss=at['val_loss'])
        better = step and at['val_loss'] < at['best']
        at |= {'best': at['val_loss'], 'waited': 0} if better else {'waited': at['waited'] + (step > 0)}
        if better and keep_best:
            save_model()
        last_step = last_step or 0 < patience <= at['waited']
    if epoch_ended and sample_every_epoch:
        show_answers()
    if step > first and (last_step or (step % save_interval == 0 if save_interval else epoch_ended)):
        save_checkpoint()
    if last_step:
        break

    # one update. The loss: summed over the supervised tokens of all micro-batches and processes, divided by their number
    began = time.perf_counter()
    torch.manual_seed(hash((seed, step, rank)))  # for dropout: a resumed run draws what the unbroken one draws
    epoch, place = divmod(at['seen'], len(length))
    order = np.random.default_rng(abs(hash((seed, epoch)))).permutation(len(length)) if shuffle else np.arange(len(length))
    numbers = order[place:place + rows_a_step]
    n_supervised, n_tokens = supervised[numbers].sum().item(), length[numbers].sum().item()
    for group in optimizer.param_groups:
        group['lr'] = get_lr(step)
    norms.clear()
    loss, chunks = 0.0, np.array_split(numbers, gradient_accumulation_steps * world)[rank::world]
    for i, chunk in enumerate(chunks):
        if shard:
            model.set_requires_gradient_sync(i == len(chunks) - 1)  # gradients are exchanged once a step
        elif world > 1:
            net.require_backward_grad_sync = i == len(chunks) - 1
        with autocast:
            part = net(*get_batch('train', chunk), denominator=n_supervised)[1]
        (part * world).backward()  # torch averages over processes; the sum is wanted
        loss += part.item()
    loss, stop = sum_over_processes(loss, len(asked))
    update()
    norm = torch.stack(norms).norm().item()
    if not math.isfinite(loss + norm):
        raise UserError(f'step {step + 1} has loss {loss} and gradient norm {norm}; the last checkpoint is kept. '
                        'Lower learning_rate or set grad_clip')
    step += 1
    at |= {'step': step, 'seen': at['seen'] + len(numbers)}
    took, lr = time.perf_counter() - began, group['lr']
    record(step=step, loss=loss, lr=lr, supervised_tokens=n_supervised, tokens=n_tokens, seconds=took, grad_norm=norm)
    bar.set_postfix_str(f'loss {loss:.3f}, {n_tokens / took:.0f} tokens/s', refresh=False)
    bar.update()
    if bar.disable:
        say(f'step {step}/{steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | '
            f'{n_tokens / took:.0f} tokens/s | {took * 1000:.0f} ms')
bar.close()

if not keep_best or at['best'] == math.inf:
    save_model()
if rank == 0:
    draw_curves(out / 'log.jsonl', out / 'loss.png', name)
say(f'{"stopped at" if stop else "finished"} step {step}; {out}/ has ckpt.pt, {name}.pth, {name}.json, log.jsonl, loss.png')
