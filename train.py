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

from config import UserError, atomic_write, configure, init_device, read_jsonl, write_json
from lora import add_lora, init_for_copying, merged_state_dict, save_adapter, train_met_tokens
from model import GPT, GPTConfig
from prepare import IGNORE, detokenize, encode_prompt, first_targets, make_batch, read_split

# -----------------------------------------------------------------------------
# the defaults, overridden by config files and flags
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
init = 'gpt2'  # of a model from scratch: 'gpt2', or 'copying', to rearrange the prompt's words (lora.py)
block_size = 1024  # longest packed row in tokens, and the positions of a model from scratch
dropout = 0.0
# batch
batch_size = 8  # examples per micro-batch and process
gradient_accumulation_steps = 1  # micro-batches per step
epochs = 1
max_steps = 0  # 0: by epochs
shuffle = True
packing = True  # several examples in a row, which do not see each other; the same loss in less time
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
grad_clip = 0.0  # largest norm of the gradients; 0: no limit
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
patience = 0  # evaluations without a lower val loss before the run ends; 0: no such end
# device
device = 'auto'  # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; 'auto': the GPU's best on cuda, float32 elsewhere
compile = False
shard = False  # several processes: split parameters and optimizer among them (FSDP2)
# -----------------------------------------------------------------------------
config = configure(globals())

# what no type can check
for key in ('batch_size', 'gradient_accumulation_steps', 'epochs', 'eval_interval', 'n_layer', 'n_head',
            'n_embd', 'max_steps', 'eval_iters'):
    lowest = 0 if key in ('max_steps', 'eval_iters') else 1
    if config[key] < lowest:
        raise UserError(f'{key}={config[key]} must be at least {lowest}')
for key, names in (('loss_on', 'answer response all'), ('schedule', 'constant cosine linear'),
                   ('decay', 'all matrices'), ('init', 'gpt2 copying')):
    if config[key] not in names.split():
        raise UserError(f'{key}={config[key]!r} is none of {names.replace(" ", ", ")}')

# the device, and the precision: weights, AdamW and sums stay in fp32; autocast computes products in less. The
# gradients of float16 underflow, so the loss is scaled up before backward and the gradients down after it
device, compute_dtype, rank, world_size = init_device(device, dtype)
autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
shard = shard and world_size > 1
out = Path(out_dir)

def print0(text):
    """Print in the first process only."""
    if rank == 0:
        print(text, flush=True)

# data: token files and, per example, its length and its supervised tokens. Both splits must be written from
# the same rows, or what is measured on val may be in train
data = {split: read_split(dataset, split, n_rows=3) for split in ('train', 'val')}
meta = data['train'][1]
lengths, supervised = meta['end'] - meta['start'], meta['end'] - first_targets(meta, loss_on)
n_examples, examples_per_step = len(lengths), batch_size * gradient_accumulation_steps * world_size
longest = max(lengths.max(), (data['val'][1]['end'] - data['val'][1]['start']).max())
data_split = {f'data_{key}': meta[key] for key in ('split_seed', 'examples', 'tokens')}
if meta['sha256'] != data['val'][1]['sha256']:
    raise UserError(f'train and val of data/{dataset} come from different rows; run: python prepare.py')

# resume: the checkpoint must agree in the data and in all that shapes the weights; these knobs may change. A
# schedule follows the new number of steps from here on
RESUME_MAY_CHANGE = {
    'init_from', 'out_dir', 'weights', 'cache_dir', 'batch_size', 'gradient_accumulation_steps', 'epochs',
    'max_steps', 'eval_interval', 'eval_iters', 'sample_every_epoch', 'save_interval', 'keep_best',
    'patience', 'device', 'compile', 'shard'}
saved = None
if init_from == 'resume':
    try:
        saved = torch.load(out / 'ckpt.pt', map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # torch.load documents no exception class
        reason = str(error).splitlines()[0]
        raise UserError(f'cannot resume from {out}/ckpt.pt ({reason}): '
                        'start without --init_from=resume') from error
    now = config | {'data': meta['sha256'], 'examples_per_step': examples_per_step, **data_split}
    # checkpoints of older versions tell neither the number of examples nor the split
    was = {'examples_per_step': saved.get('examples_per_step', examples_per_step)} | saved.get('split', {})
    was |= saved['config'] | {'data': saved['sha256']}
    differences = [f'{key} was {was[key]!r}, is {now[key]!r}' for key in now
                   if key in was and key not in RESUME_MAY_CHANGE and was[key] != now[key]]
    if differences:
        raise UserError(f'{out}/ckpt.pt is of another run: {", ".join(differences)}; set them back, '
                        'or start without resume')
origin = saved['config']['init_from'] if saved else init_from

# model: from the checkpoint, at random, or from someone's weights. With LoRA the checkpoint holds A and B
# alone, so the base is loaded again
torch.manual_seed(seed)
if saved and not lora_rank:
    model = GPT(GPTConfig(**saved['model_config']))  # the checkpoint holds all of its weights
elif origin == 'scratch':
    model = GPT(GPTConfig(block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout))
    if init == 'copying':
        init_for_copying(model)
else:
    model = GPT.from_pretrained(origin, cache_dir=cache_dir, weights=weights, dropout=dropout)
name = f'{model.config.name}-sft'

# the data must fit the model's positions and its vocabulary
max_length = min(block_size, model.config.block_size)
if longest > max_length:
    raise UserError(f'data/{dataset} has a row of {longest} tokens; '
                    f'run: python prepare.py --block_size={max_length}')
if model.config.vocab_size < meta['vocab_size']:
    raise UserError(f'{origin} has {model.config.vocab_size} tokens, data/{dataset} {meta["vocab_size"]}')
# LoRA replaces the matrices of the blocks; from here on only its A and B are trained
if lora_rank:
    add_lora(model, lora_rank, lora_alpha, lora_dropout, lora_targets, quantize)
elif quantize != 'none':
    raise UserError(f'quantize={quantize!r} freezes the matrices, so it needs LoRA: add --lora_rank=16')
model.to(device)
if init == 'copying' and origin == 'scratch':
    train_met_tokens(model, data['train'][0], shard)

# wrap it: `model` keeps the plain names, `net` is what a step of training calls. FSDP splits each block among
# the processes; DDP keeps the model whole in each and averages the gradients
net = model
if compile:
    model.compile(dynamic=True)
if shard:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for module in (*model.h, model):
        fully_shard(module)
    register_fsdp_forward_method(model, 'generate')
elif world_size > 1:
    net = torch.nn.parallel.DistributedDataParallel(model)
params = [p for p in model.parameters() if p.requires_grad]
print0(f'{model.config.name} on {device}: {sum(p.numel() for p in model.parameters()):,} parameters, '
       f'{sum(p.numel() for p in params):,} of them trained')

# optimizer: in the paper's form all parameters decay; with 'matrices' biases and norms do not
groups = [{'params': params}]
if decay == 'matrices':
    groups = [{'params': [p for p in params if p.dim() > 1]},
              {'params': [p for p in params if p.dim() == 1], 'weight_decay': 0.0}]
# fused: one pass over weights, moments and gradients
optimizer = torch.optim.AdamW(groups, learning_rate, (beta1, beta2), weight_decay=weight_decay, fused=True)
grad_norms = []  # of the groups of gradients that a step has applied

def apply_gradients(*_):
    """AdamW for the parameters that have a gradient. Frees the gradients, adds their norm to grad_norms."""
    scaler.unscale_(optimizer)
    # row by row, since torch sums a whole matrix in one fp32 number, which is 1e-4 off
    row_norms = [torch.linalg.vector_norm(p.grad, dim=-1) for p in params if p.grad is not None]
    if not row_norms:
        return
    norm = torch.nn.utils.get_total_norm(row_norms)
    norm = norm.full_tensor() if shard else norm
    grad_norms.append(norm)
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

# where nothing needs all gradients at once (accumulation, processes, clipping, the scaler), each block is
# updated as soon as backward has passed it, and its gradients are freed: a step of Medium peaks at 16 % less
# memory. A gradient is complete when its hook runs, even that of wte, which is used twice
if not (world_size > 1 or gradient_accumulation_steps > 1 or grad_clip or scaler.is_enabled()):
    for block in model.h:
        first_param = next(p for p in block.parameters() if p.requires_grad)
        first_param.register_post_accumulate_grad_hook(apply_gradients)

# progress: updates done, examples seen, the lowest val loss, evaluations since then, the last val loss and
# its step. With the weights and AdamW's moments it is all that a resumed run needs: random numbers depend on
# the step
progress = {'step': 0, 'seen': 0, 'best': math.inf, 'waited': 0, 'val_loss': math.nan, 'evaluated': -1}
state_options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True,
                                 strict=not lora_rank)
if saved:
    set_state_dict(model, optimizer, model_state_dict=saved['model'], optim_state_dict=saved['optimizer'],
                   options=state_options)
    if saved.get('scaler'):  # empty, or missing in older checkpoints, where no float16 was used
        scaler.load_state_dict(saved['scaler'])
    progress |= saved['progress'] if 'progress' in saved else saved['at'] | {'evaluated': saved['at']['step']}
    if keep_best and not saved['config']['keep_best']:
        progress['best'] = math.inf  # that model was not kept
    del saved

# how many updates: the last one of an epoch may be of fewer examples
first_step = progress['step']
total_steps = max_steps or epochs * math.ceil(n_examples / examples_per_step)

@functools.lru_cache(1)
def epoch_order(epoch):
    """-> the numbers of all examples, in the order in which this epoch takes them."""
    rng = np.random.default_rng(abs(hash((seed, epoch))))
    return rng.permutation(n_examples) if shuffle else np.arange(n_examples)

def get_batch(split, numbers):
    """-> ids, targets, positions, segments (B, T) on the device; no numbers: a row without a target."""
    batch = make_batch(data[split], numbers if len(numbers) else [0], packing, loss_on, max_length)
    if not len(numbers):
        batch[1][:] = IGNORE  # a process without examples still takes part in the step
    # without packing there are no segments: attention is plainly causal
    return [torch.from_numpy(array).to(device) for array in (batch if packing else batch[:3])]

def sum_over_processes(*values):
    """Numbers of this process -> their sums over all processes."""
    dtype = torch.float32 if device.type == 'mps' else torch.float64  # mps has no float64
    total = torch.tensor(values, device=device, dtype=dtype)
    if world_size > 1:
        dist.all_reduce(total)
    return total.tolist()

@torch.no_grad()
def estimate_loss(split):
    """-> nats per supervised token of eval_iters batches, the same ones each time, shared among processes."""
    model.eval()
    meta = data[split][1]
    # a fixed choice of examples, so that evaluations can be compared
    numbers = np.random.default_rng(abs(seed)).permutation(len(meta['start']))
    if eval_iters:
        numbers = numbers[:eval_iters * batch_size * world_size]
    chunks = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    while len(chunks) % world_size:
        chunks.append(numbers[:0])  # each process computes equally many
    loss = 0.0
    for chunk in chunks[rank::world_size]:
        with autocast:
            loss += model(*get_batch(split, chunk), loss_reduction='sum')[1].item()
    model.train()
    n_supervised = (meta['end'] - first_targets(meta, loss_on))[numbers].sum().item()
    return sum_over_processes(loss)[0] / n_supervised

def get_lr(step):
    """-> the learning rate of a step: linear warm-up, then constant, linear or cosine down to min_lr."""
    done = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    left = {'constant': 1.0, 'linear': 1 - done, 'cosine': 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return (min_lr + left * (learning_rate - min_lr)) * min(1, (step + 1) / max(1, warmup_steps))

def show_answers():
    """Answer three val prompts and print the answers beside the references: worth a look after each epoch."""
    rows = data['val'][1]['rows'][:3]
    with autocast:
        answers = model.generate([encode_prompt(row) for row in rows], max_new_tokens=50)
    for row, answer in zip(rows, answers):
        log_line(f'  {row["instruction"]}  {row.get("input") or ""}')
        log_line(f'    reference: {row["output"]}\n    answer:    {detokenize(answer)}')

def save_checkpoint():
    """ckpt.pt: all that --init_from=resume needs. Under FSDP every process gathers; the first one writes."""
    # torch's own form of both states: by parameter name, whole tensors, equal for any number of processes
    model_state, optimizer_state = get_state_dict(model, optimizer, options=state_options)
    checkpoint = {'model': model_state, 'optimizer': optimizer_state, 'scaler': scaler.state_dict(),
                  'progress': progress, 'config': config | {'init_from': origin}, 'sha256': meta['sha256'],
                  'model_config': asdict(model.config), 'examples_per_step': examples_per_step,
                  'split': data_split}
    if rank == 0:
        atomic_write(out / 'ckpt.pt', lambda file: torch.save(checkpoint, file), 'wb')

def save_model():
    """<model>-sft.pth, a plain state dict with LoRA merged, its .json; and LoRA's own matrices beside it."""
    state = merged_state_dict(model)
    about = {'model': asdict(model.config), 'init_from': origin, 'sha256': meta['sha256'], 'config': config}
    about |= progress
    if lora_rank:
        save_adapter(model, out / 'adapter.safetensors', about, write=rank == 0)
    if rank == 0:
        atomic_write(out / f'{name}.pth', lambda file: torch.save(state, file), 'wb')
        write_json(out / f'{name}.json', about)

def log_record(**fields):
    """Append a line to log.jsonl, in the first process only."""
    if rank == 0:
        with open(out / 'log.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps(fields) + '\n')

def draw_losses(path):
    """The losses of log.jsonl as a picture: of each step, and of both splits at each evaluation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print0(f'{path} is not drawn: pip install matplotlib')
    records, figure = read_jsonl(out / 'log.jsonl'), Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    for key, style in ('loss', '-'), ('train_loss', 'o--'), ('val_loss', 'o-'):
        points = [(record['step'], record[key]) for record in records if key in record]
        axes.plot(*zip(*points), style, label=key, markersize=3)
    axes.set(xlabel='step', ylabel='nats per supervised token', title=name)
    axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format='png', dpi=150), 'wb')

# log.jsonl continues behind the checkpoint: what an interrupted run logged after it will be logged again
if rank == 0:
    records = read_jsonl(out / 'log.jsonl') if first_step else []
    kept = [json.dumps(record) + '\n' for record in records if record['step'] <= first_step]
    atomic_write(out / 'log.jsonl', lambda file: file.writelines(kept))

# Ctrl-C, or a scheduler's SIGTERM, ends the run after the current step, saved; a second one ends it at once
stop_signals = []

def request_stop(number, frame):
    """The first signal: remember it, and give the next one its usual effect."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)

for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, request_stop)

# the loop: evaluation at both ends, and total_steps updates between
print0(f'{n_examples} examples, {examples_per_step} per step; from step {first_step} to {total_steps}')
bar = tqdm(total=total_steps, initial=first_step, unit='step', disable=None if rank == 0 else True)
log_line = print0 if bar.disable else bar.write
model.train()
was_stopped = False
for step in range(first_step, total_steps + 1):
    # what this step has to do besides the update
    epoch_ended = step > first_step and progress['seen'] % n_examples == 0
    eval_is_due = step % eval_interval == 0 or step == total_steps
    should_eval = eval_is_due and not was_stopped and progress['evaluated'] < step

    # evaluate, at both ends of a run and every eval_interval steps, and keep the best model. A run that is
    # told to stop leaves the evaluation of its last step to the run that resumes it
    if should_eval:
        train_loss, val_loss = estimate_loss('train'), estimate_loss('val')
        log_line(f'step {step}/{total_steps} | train loss {train_loss:.4f} | val loss {val_loss:.4f}')
        log_record(step=step, train_loss=train_loss, val_loss=val_loss)
        progress['val_loss'], progress['evaluated'] = val_loss, step
        if step > 0 and val_loss < progress['best']:
            progress['best'], progress['waited'] = val_loss, 0
            if keep_best:
                save_model()
        elif step > 0:
            progress['waited'] += 1
    if epoch_ended and sample_every_epoch:
        show_answers()

    # save: at the end, and every save_interval steps or once an epoch. The end is the last step, a signal, or
    # a val loss that has not fallen for long
    should_end = step == total_steps or was_stopped or 0 < patience <= progress['waited']
    save_is_due = step % save_interval == 0 if save_interval else epoch_ended
    if step > first_step and (should_end or save_is_due):
        save_checkpoint()
    if should_end:
        break

    # the examples of this step, fewer at the end of an epoch, and its learning rate. Dropout draws from the
    # step's own seed, so that a resumed run draws the same numbers
    start_time = time.perf_counter()
    epoch, place = divmod(progress['seen'], n_examples)
    numbers, lr = epoch_order(epoch)[place:place + examples_per_step], get_lr(step)
    n_supervised, n_tokens = supervised[numbers].sum().item(), lengths[numbers].sum().item()
    for group in optimizer.param_groups:
        group['lr'] = lr
    torch.manual_seed(hash((seed, step, rank)))

    # forward and backward. The loss is the sum over the supervised tokens of the whole step, divided by
    # their number: it does not depend on how the examples are cut into micro-batches and processes
    loss = 0.0
    grad_norms.clear()
    micro_batches = np.array_split(numbers, gradient_accumulation_steps * world_size)[rank::world_size]
    for i, chunk in enumerate(micro_batches):
        is_last_micro_batch = i == len(micro_batches) - 1
        if shard:
            model.set_requires_gradient_sync(is_last_micro_batch)  # gradients are exchanged once per step
        elif world_size > 1:
            net.require_backward_grad_sync = is_last_micro_batch
        with autocast:
            micro_loss = net(*get_batch('train', chunk), loss_reduction='sum')[1] / n_supervised
        scaler.scale(micro_loss * world_size).backward()  # torch averages over processes, the sum is wanted
        loss += micro_loss.item()

    # update; where blocks were updated in backward, only the embeddings and ln_f are left. Then sum up over
    # the processes: the loss, and the signals to stop that came in
    apply_gradients()
    loss, was_stopped = sum_over_processes(loss, len(stop_signals))
    norm = torch.stack(grad_norms).norm().item()
    if not math.isfinite(loss) or not math.isfinite(norm) and scaler.get_scale() <= 1:
        raise UserError(f'step {step + 1} has loss {loss} and gradient norm {norm}; the last checkpoint is '
                        'kept. Lower learning_rate or set grad_clip')
    progress['step'], progress['seen'] = step + 1, progress['seen'] + len(numbers)

    # log what was optimized: to the file always, to the terminal as a bar, to a pipe or a log as a line
    seconds = time.perf_counter() - start_time
    fields = {'loss': loss, 'lr': lr, 'supervised_tokens': n_supervised, 'tokens': n_tokens,
              'seconds': seconds, 'grad_norm': norm if math.isfinite(norm) else None}
    if scaler.is_enabled():  # where gradients overflow float16, the step is skipped and the scale halved
        fields['loss_scale'] = scaler.get_scale()
    log_record(step=step + 1, **fields)
    bar.set_postfix_str(f'loss {loss:.3f}, {n_tokens / seconds:.0f} tokens/s', refresh=False)
    bar.update()
    if bar.disable:
        print0(f'step {step + 1}/{total_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | '
               f'{n_tokens / seconds:.0f} tokens/s | {seconds * 1000:.0f} ms')
bar.close()

# the model of the end, unless the best one is kept already
if not keep_best or progress['best'] == math.inf:
    save_model()
if rank == 0:
    draw_losses(out / 'loss.png')
    files = ', '.join(sorted(file.name for file in out.iterdir() if file.is_file()))
    print(f'{"stopped at" if was_stopped else "finished"} step {progress["step"]}; {out}/ has {files}')
