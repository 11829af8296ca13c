"""
Instruction-tune GPT-2: response-only loss, evaluation, checkpoints. One process, or several under torchrun.

    python train.py config/sft_medium.py
    python train.py config/sft_medium.py --init_from=resume
    torchrun --nproc_per_node=2 train.py config/sft_medium.py
"""
import contextlib
import functools
import json
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from config import (
    UserError,
    atomic_write,
    check_made_of,
    configure,
    lock_folder,
    read_json,
    read_jsonl,
    write_json,
)
from engine import choose_device, generate, join_processes
from lora import add_lora, gather, merged_state_dict, save_adapter
from model import GPT, RELEASED, GPTConfig, fingerprint
from prepare import (
    IGNORE,
    VOCAB_SIZE,
    data_hash,
    detokenize,
    encode_prompt,
    first_targets,
    make_batch,
    read_split,
)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

# -----------------------------------------------------------------------------
# the defaults, overridden by config files and flags
# run
dataset = 'instruction-data'  # the folder below data/ that prepare.py wrote
out_dir = 'out'  # where everything goes
init_from = 'gpt2-medium'  # 'scratch', 'resume', gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path
download_from = 'openai'  # whose files of gpt2* are tried first [openai | huggingface]
cache_dir = ''  # where downloaded weights are kept; empty: gpt2-sft in the user's cache folder
seed = 123
# model
n_layer = 12  # of a model from scratch [>= 1]
n_head = 12  # of a model from scratch [>= 1]
n_embd = 768  # of a model from scratch [>= 1]
block_size = 1024  # longest packed row in tokens, and the positions of a model from scratch [>= 2]
dropout = 0.0  # [0 .. 0.99]
# batch
batch_size = 8  # examples per micro-batch and process [>= 1]
gradient_accumulation_steps = 1  # micro-batches per step [>= 1]
epochs = 1  # [>= 1]
max_steps = 0  # 0: by epochs [>= 0]
shuffle = True
packing = True  # several examples to a row, hidden from each other: the same loss in half the time
loss_on = 'response'  # which tokens are learned [response | response+header | all]
sampled_softmax = 0  # a step's vocabulary beside its own tokens, see below; 0: all tokens [>= 0]
# adamw
learning_rate = 5e-5  # [> 0]
schedule = 'constant'  # after the warm-up [constant | cosine | linear]
warmup_steps = 0  # [>= 0]
min_lr = 0.0  # where cosine and linear end [>= 0]
weight_decay = 0.1  # [>= 0]
decay_params = 'all'  # 'matrices' leaves out biases and norms [all | matrices]
beta1 = 0.9  # [0 .. 0.999999]
beta2 = 0.999  # [0 .. 0.999999]
grad_clip = 0.0  # largest norm of the gradients; 0: no limit [>= 0]
# lora
lora_rank = 0  # 0: all weights are trained [>= 0]
lora_alpha = 16.0  # [> 0]
lora_dropout = 0.0  # [0 .. 0.99]
lora_targets = 'attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj'
quantize = 'none'  # the frozen matrices under LoRA; nf4 needs bitsandbytes [none | nf4]
# evaluation and checkpoints
eval_interval = 5  # steps [>= 1]
eval_iters = 5  # batches of each split and process; 0: all of it [>= 0]
eval_only = False  # print both losses and end
sample_every_epoch = True  # answer a few val prompts
save_interval = 0  # steps between checkpoints; 0: one an epoch [>= 0]
save_minutes = 10.0  # and one after so many minutes [> 0]
keep_best = False  # keep the weights of the lowest val loss instead of the last
patience = 0  # stop after this many evaluations without a lower val loss; 0: never [>= 0]
logger = 'none'  # beside log.jsonl [none | tensorboard | wandb]
# device
device = 'auto'  # [auto | cpu | cuda | mps]
dtype = 'auto'  # auto: the GPU's best on cuda, else float32 [auto | float32 | bfloat16 | float16]
compile = False
shard = False  # several processes: split parameters and optimizer among them (FSDP2)
# -----------------------------------------------------------------------------
config = configure(globals())

# the device, and the precision: weights, AdamW and sums stay in fp32; autocast computes products in less. The
# gradients of float16 underflow, so the loss is scaled up before backward and the gradients down after it
device, compute_dtype = choose_device(device, dtype)
rank, world_size = join_processes(device)
is_half = compute_dtype != torch.float32
autocast = torch.autocast(device.type, compute_dtype, enabled=is_half)
scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
shard = shard and world_size > 1
out = Path(out_dir)


def print0(text):
    """Print in the first process only, at once: a log is read while it is written."""
    if rank == 0:
        print(text, flush=True)


# -----------------------------------------------------------------------------
# data: token files, and for each example how many tokens it has and how many of them are learned

data = {split: read_split(dataset, split, n_rows=3) for split in ('train', 'val')}  # 3: of val are answered
meta = data['train'].meta
n_tokens_of = meta['end'] - meta['start']
n_targets_of = meta['end'] - first_targets(meta, loss_on)
n_examples = len(n_tokens_of)
examples_per_step = batch_size * gradient_accumulation_steps * world_size
longest = max(n_tokens_of.max(), (data['val'].meta['end'] - data['val'].meta['start']).max())
if meta['sha256'] != data['val'].meta['sha256']:
    raise UserError(f'train and val of data/{dataset} come from different rows; prepare the data again')

# -----------------------------------------------------------------------------
# the model: from a checkpoint, at random, or from someone's weights

# what a resumed run must have in common with the checkpoint; all other settings may change, and are printed
RESUME_KEEPS = (
    'dataset', 'seed', 'n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'shuffle', 'packing',
    'loss_on', 'sampled_softmax', 'lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets', 'quantize',
    'dtype', 'examples_per_step', 'data_split_seed', 'data_examples', 'data_tokens')


def read_checkpoint():
    """The content of ckpt.pt, whose tensors become those of the run. UserError if it is of another run."""
    try:
        # on a CPU the tensors are used as they are read; for another device the file is only mapped
        saved = torch.load(out / 'ckpt.pt', map_location='cpu', weights_only=True, mmap=device.type != 'cpu')
        was = saved['config'] | {'examples_per_step': saved['examples_per_step']}
    except Exception as error:  # torch.load documents no exception class
        reason = str(error).splitlines()[0]
        raise UserError(f'cannot resume from {out}/ckpt.pt ({reason}): '
                        'start without --init_from=resume') from error
    now = config | {'examples_per_step': examples_per_step}
    if 'format' not in saved:
        # format 1 has other names for the same loss_on, and tells its rows by their number
        was.pop('loss_on')
        was |= saved.get('split', {})
        now |= {f'data_{key}': meta.get(key) for key in ('split_seed', 'examples', 'tokens')}
    changed = [key for key in now if key in was and was[key] != now[key]]
    differences = [
        f'{key} was {was[key]!r}, is {now[key]!r}' for key in changed if key in RESUME_KEEPS]
    if differences:
        raise UserError(
            f'{out}/ckpt.pt is of another run: {", ".join(differences)}; set them back, or start without '
            '--init_from=resume')
    for key in sorted(set(changed) - {'init_from', 'out_dir'}):
        print0(f'resumed with another {key}: {was[key]!r} is {now[key]!r} from here on')
    return saved


saved = read_checkpoint() if init_from == 'resume' else None
# the run would overwrite such a base, with which sample.py compares
origin = saved['config']['init_from'] if saved else init_from
is_path = origin not in RELEASED and Path(origin).exists()
if is_path and not eval_only and Path(origin).resolve().is_relative_to(out.resolve()):
    raise UserError(f'init_from={origin} lies in out_dir={out_dir}, where this run would replace it: '
                    'set --out_dir to another folder')
if n_embd % n_head:
    raise UserError(f'n_embd={n_embd} must be a multiple of n_head={n_head}')
if quantize != 'none' and (not lora_rank or shard):
    raise UserError(f'quantize={quantize!r} freezes the matrices: it needs --lora_rank=16, and no --shard')
if sampled_softmax and shard:
    raise UserError('sampled_softmax goes with one process or several, not with shard=True')

# a model from scratch, and LoRA's matrices, are drawn from this seed
torch.manual_seed(seed)
if saved and not lora_rank:
    # made without memory: the tensors that were read become its weights, so that a resumed run needs no more
    # than the run itself
    with torch.device('meta'):
        model = GPT(GPTConfig(**saved['model_config']))
    model.load_state_dict(saved.pop('model'), assign=True)
elif origin == 'scratch':
    model = GPT(GPTConfig(block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout))
else:
    model = GPT.from_pretrained(origin, cache_dir, download_from, dropout, vocab_size=VOCAB_SIZE)
name = f'{model.config.name}-sft'

# what this run is made of, which is written into all that it makes: a later stage, or a run that goes on,
# refuses other rows and another base. The weights of a resumed run are no longer those of its base
made_of = {'data': data_hash(dataset)}
if saved and not lora_rank:
    base_weights = saved.get('made_of', {}).get('base weights')  # which format 1 does not tell
else:
    base_weights = fingerprint(model.state_dict())
if base_weights:
    made_of['base weights'] = base_weights
if saved:
    check_made_of(out / 'ckpt.pt', saved.get('made_of', {}), made_of, 'start without --init_from=resume')

# the data must fit the model's positions and its vocabulary
max_length = min(block_size, model.config.block_size)
if longest > max_length:
    raise UserError(f'data/{dataset} has a row of {longest} tokens; '
                    f'prepare the data again with --block_size={max_length}')
if model.config.vocab_size < meta['vocab_size']:
    raise UserError(f'{origin} has {model.config.vocab_size} tokens, data/{dataset} {meta["vocab_size"]}')
if origin == 'scratch' and learning_rate < 2e-4:
    print0(f'warning: learning_rate={learning_rate} is for fine-tuning; from scratch 1e-3 is usual')

# LoRA replaces the matrices of the blocks; from here on only its A and B are trained
n_params = sum(p.numel() for p in model.parameters())  # counted here, since 4 bits would count otherwise
if lora_rank:
    add_lora(model, lora_rank, lora_alpha, lora_dropout, lora_targets, quantize)
    if saved:
        model.load_state_dict(saved.pop('model'), strict=False, assign=True)
model.to(device)

# `model` keeps the plain names, `net` is what a step calls. FSDP splits each block among the processes; DDP
# keeps the model whole in each and averages the gradients
net = model
if compile:
    model.compile(dynamic=True)
if shard:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    # each process gathers a block's matrices in half precision, and frees them behind it
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in (*model.h, model):
        fully_shard(module, mp_policy=policy)
    register_fsdp_forward_method(model, 'hidden_states')
    register_fsdp_forward_method(model, 'logits')
elif world_size > 1:
    net = torch.nn.parallel.DistributedDataParallel(model)
# what the optimizer gets; under LoRA a few percent of all
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
print0(f'{model.config.name} on {device}: {n_params:,} parameters, '
       f'{sum(p.numel() for p in trained.values()):,} trained')

# -----------------------------------------------------------------------------
# sampled softmax (Jean et al. 2015): in a large vocabulary most tokens occur in no row, and computing all
# their logits takes most of a small model's time. A step has a vocabulary of its own: the tokens of its rows,
# a sample of those that only other rows have, and a sample of those that no row has

if sampled_softmax:
    in_some_row = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    in_some_row[np.unique(data['train'].ids).tolist()] = True


def draw_vocabulary(numbers):
    """
    The ids, in their order, of the vocabulary for a step on these examples: some thousand in place of 50,257.
    It is drawn anew for each step, so that in time every id is one that must not be chosen.
    """
    in_step = torch.zeros_like(in_some_row)
    for start, end in zip(meta['start'][numbers], meta['end'][numbers]):
        in_step[torch.from_numpy(data['train'].ids[start:end].astype(np.int64))] = True
    chosen = [in_step.nonzero()[:, 0]]
    for group in in_some_row & ~in_step, ~in_some_row:
        members = group.nonzero()[:, 0]
        chosen.append(members[torch.randperm(len(members), device=device)[:sampled_softmax]])
    return torch.cat(chosen).sort().values


@contextlib.contextmanager
def smaller_vocabulary(vocabulary, batch):
    """
    In this context the model has no other ids than these, and the batch, which is changed, holds their places
    among them: for the vocabulary [7, 9, 300] the ids 9, 300 become 1, 2. Backward belongs into it, too. The
    gradients of the vectors reach the whole matrix.
    """
    whole = model.wte.weight
    del model.wte.weight
    model.wte.weight = F.embedding(vocabulary, whole)
    ids, targets = batch[:2]
    batch[0] = torch.searchsorted(vocabulary, ids)
    batch[1] = torch.where(targets == IGNORE, IGNORE, torch.searchsorted(vocabulary, targets))
    yield
    del model.wte.weight
    model.wte.weight = whole


# -----------------------------------------------------------------------------
# the optimizer

params = list(trained.values())
groups = [{'params': params}]  # as chapter 7 and PyTorch's default do it, all parameters decay
if decay_params == 'matrices':
    groups = [{'params': [p for p in params if p.dim() > 1]},
              {'params': [p for p in params if p.dim() == 1], 'weight_decay': 0.0}]
# fused: one pass over weights, moments and gradients
optimizer = torch.optim.AdamW(groups, learning_rate, (beta1, beta2), weight_decay=weight_decay, fused=True)
grad_norms = []  # of the gradients that a step has applied; of all of them at once, but for what is below


def update_parameters():
    """AdamW for the parameters that have a gradient. Frees the gradients, adds their norm to grad_norms."""
    scaler.unscale_(optimizer)
    # row by row: torch sums a whole matrix in one fp32 number, which loses up to two percent of millions
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


# on a CPU a step takes less time and memory (tests/bench.py --only=tricks) if each block is updated, and its
# gradients are freed, as soon as backward has passed it. Elsewhere, and where a step needs all gradients at
# once, they are there after backward, as usual
updates_in_backward = (device.type == 'cpu' and world_size == 1 and gradient_accumulation_steps == 1
                       and not grad_clip and not scaler.is_enabled())
if updates_in_backward:
    for block in model.h:
        # backward comes to it among the last; what is still missing then is updated with the next block
        first_param = next(p for p in block.parameters() if p.requires_grad)
        first_param.register_post_accumulate_grad_hook(lambda p: update_parameters())


def restore_optimizer(moments):
    """Give AdamW the moments of a checkpoint, {parameter's name: its state}, which become its own."""
    for name, state in moments.items():
        p = trained[name]
        state = {key: value.to(device) for key, value in state.items()}
        if shard:
            # each process keeps its part of them, as it does of the weights
            from torch.distributed.tensor import distribute_tensor
            for key in 'exp_avg', 'exp_avg_sq':
                state[key] = distribute_tensor(state[key], p.device_mesh, p.placements)
        optimizer.state[p] = state


# what a resumed run needs beside the weights and the moments: random numbers depend on the step alone
progress = {'step': 0, 'examples_seen': 0, 'best_val_loss': math.inf, 'evals_since_best': 0,
            'val_loss': None, 'last_eval_step': -1}
if saved:
    restore_optimizer(saved.pop('optimizer')['state'])
    scaler.load_state_dict(saved['scaler'])
    progress = dict(zip(progress, saved['progress'].values()))  # by place: format 1 has other names
    if keep_best and not saved['config']['keep_best']:
        progress['best_val_loss'] = math.inf  # that model was not kept
    del saved

# -----------------------------------------------------------------------------
# batches, evaluation, the learning rate

# a step is one update of the weights; step s is the state after s of them
first_step = progress['step']
# the last step of an epoch may be of fewer examples
total_steps = max_steps or epochs * math.ceil(n_examples / examples_per_step)
if first_step > total_steps:
    raise UserError(f'{out}/ckpt.pt is at step {first_step}, past the {total_steps} of this run: '
                    'raise --max_steps or --epochs')


def random_seed(*numbers):
    """A seed of 64 bits that depends on all of these numbers."""
    entropy = [abs(number) for number in (seed, *numbers)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


@functools.lru_cache(1)
def epoch_order(epoch):
    """The numbers of all examples, in the order in which this epoch takes them."""
    if not shuffle:
        return np.arange(n_examples)
    return np.random.default_rng(random_seed(epoch)).permutation(n_examples)


def get_batch(split, numbers):
    """ids, targets, positions, segments (B, T) on the device; without numbers a row that has no target."""
    batch = make_batch(data[split], numbers if len(numbers) else [0], packing, loss_on, max_length)
    if not len(numbers):
        batch[1][:] = IGNORE  # a process without examples still takes part in the step
    # without packing there are no segments: attention is plainly causal
    return [torch.from_numpy(array).to(device) for array in (batch if packing else batch[:3])]


def sum_over_processes(*values):
    """Numbers of this process -> their sums over all processes."""
    if world_size == 1:
        return list(values)
    total = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def estimate_loss(split):
    """
    Nats per target of eval_iters batches, the same ones each time, shared among the processes; None if a
    signal to stop comes meanwhile.
    """
    # without dropout
    model.eval()
    its_meta = data[split].meta
    # a fixed choice of examples, so that evaluations can be compared
    numbers = np.random.default_rng(abs(seed)).permutation(len(its_meta['start']))
    if eval_iters:
        numbers = numbers[:eval_iters * batch_size * world_size]
    chunks = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    while len(chunks) % world_size:
        chunks.append(numbers[:0])  # each process computes equally many
    # a sum over targets, divided once at the end: the loss does not depend on batch_size
    loss = 0.0
    for chunk in chunks[rank::world_size]:
        if any(sum_over_processes(len(stop_signals))):
            return None
        with autocast:
            loss += model(*get_batch(split, chunk), loss_reduction='sum').item()
    model.train()
    n_targets = (its_meta['end'] - first_targets(its_meta, loss_on))[numbers].sum().item()
    return sum_over_processes(loss)[0] / n_targets


def get_lr(step):
    """The learning rate of a step."""
    # 1) linear warm-up
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    # 2) constant
    if schedule == 'constant':
        return learning_rate
    # 3) down to min_lr, linearly or by half a cosine
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    left = 1 - done if schedule == 'linear' else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + left * (learning_rate - min_lr)


def show_answers():
    """Answer three val prompts and print the answers beside the references: worth a look after each epoch."""
    rows = data['val'].meta['rows'][:3]
    with autocast:
        answers = generate(model, [encode_prompt(row) for row in rows], max_new_tokens=50)
    for row, answer in zip(rows, answers):
        log_line(f'  {row["instruction"]}  {row.get("input") or ""}')
        log_line(f'    reference: {row["output"]}\n    answer:    {detokenize(answer)}')


# -----------------------------------------------------------------------------
# what the run writes

def save_checkpoint():
    """ckpt.pt: all that --init_from=resume needs. Under FSDP every process gathers; the first one writes."""
    # whole tensors by parameter name, so that any number of processes can go on. The frozen weights of LoRA
    # are left out, since they are those of the base
    weights = {}
    moments = {}
    for name, p in (trained if lora_rank else dict(model.named_parameters())).items():
        weights[name] = gather(p)
        if p in optimizer.state:
            moments[name] = {key: gather(value) for key, value in optimizer.state[p].items()}
    checkpoint = {
        'format': 2, 'model': weights, 'optimizer': {'state': moments}, 'scaler': scaler.state_dict(),
        'progress': progress, 'config': dict(config) | {'init_from': origin}, 'made_of': made_of,
        'model_config': asdict(model.config), 'examples_per_step': examples_per_step}
    if rank == 0:
        atomic_write(out / 'ckpt.pt', lambda file: torch.save(checkpoint, file), 'wb')


def save_model():
    """<model>-sft.pth, a plain state dict with LoRA merged, and its .json; first LoRA's own matrices."""
    about = {
        'model': asdict(model.config), 'init_from': origin, 'sha256': meta['sha256'], 'config': config,
        'made_of': made_of, 'step': progress['step'],
        # None where a stopped run has not been evaluated at its last step
        'val_loss': progress['val_loss'] if progress['last_eval_step'] == progress['step'] else None}
    if lora_rank:
        save_adapter(model, out / 'adapter.safetensors', about, write=rank == 0)
    # written first, the adapter is safe should merging take too much memory
    state = merged_state_dict(model)
    if rank == 0:
        about['weights'] = fingerprint(state)
        atomic_write(out / f'{name}.pth', lambda file: torch.save(state, file), 'wb')
        write_json(out / f'{name}.json', about)


def log_record(**fields):
    """Append a line to log.jsonl and give it to the logger, in the first process only."""
    if rank > 0:
        return
    # opened for each line, so that it is on the disk when the run is killed
    with open(out / 'log.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps(fields) + '\n')
    step = fields['step']
    if logger == 'tensorboard':
        for key, value in fields.items():
            if key != 'step' and value is not None:
                board.add_scalar(key, value, step)
    elif logger == 'wandb':
        board.log(fields, step=step)


def draw_losses(path):
    """The losses of log.jsonl as a picture: of each step, and of both splits at each evaluation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        # a picture is no reason to fail at the end of a run
        return print0(f'{path} is not drawn: pip install matplotlib')
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    records = read_jsonl(out / 'log.jsonl')
    # each step has a loss, an evaluation the losses of both splits
    for key, style in ('loss', '-'), ('train_loss', 'o--'), ('val_loss', 'o-'):
        logged = [record for record in records if key in record]
        steps = [record['step'] for record in logged]
        axes.plot(steps, [record[key] for record in logged], style, label=key, markersize=3)
    axes.set(xlabel='step', ylabel='nats per target', title=name)
    axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format='png', dpi=150), 'wb')


# a fresh start moves the files of an earlier run aside, whole: none of them may pass for this one's
ARTIFACTS = ('log.jsonl', 'ckpt.pt', '*-sft.pth', '*-sft.json', 'adapter.safetensors', 'loss.png',
             'instruction-data-with-response*', 'question-answers*', 'pseudo-labels*', 'scores*', 'report*',
             'export', 'tensorboard')


def set_aside(out):
    """Move an earlier run's files to out/replaced-<number>, and say so."""
    found = [path for pattern in ARTIFACTS for path in out.glob(pattern)]
    moving = out / 'replaced-unfinished'  # its name until it holds all: a kill in between does no harm
    if not moving.exists() and not any(path.name.endswith(('.jsonl', '.pt', '-sft.pth')) for path in found):
        return
    number = 1
    while (out / f'replaced-{number}').exists():
        number += 1
    moving.mkdir(exist_ok=True)
    for path in found:
        path.rename(moving / path.name)
    moving.rename(out / f'replaced-{number}')
    print(f'{out} held another run: it is in {out}/replaced-{number} now (to go on with it, move it back and '
          'set --init_from=resume)')


if rank == 0 and not eval_only:
    # first what may be missing, so that it ends the run before anything is moved
    if logger == 'tensorboard':
        from torch.utils.tensorboard import SummaryWriter
    elif logger == 'wandb':
        import wandb
    lock_folder(out)
    if init_from != 'resume':
        set_aside(out)
    # the log continues behind the checkpoint: what an interrupted run logged after it will be logged again
    records = read_jsonl(out / 'log.jsonl')
    kept_lines = [json.dumps(record) + '\n' for record in records if record['step'] <= first_step]
    atomic_write(out / 'log.jsonl', lambda file: file.writelines(kept_lines))
    if logger == 'tensorboard':
        board = SummaryWriter(str(out / 'tensorboard'))
    elif logger == 'wandb':
        board = wandb.init(project='gpt2-sft', name=out.name, dir=out, config=dict(config))

# Ctrl-C, a scheduler's SIGTERM or a lost terminal ends the run after the current step, saved; a second one
# ends it at once. One that comes within moments is the same: programs like timeout pass on what came to all
stop_signals = {}  # name: when it came


def request_stop(number, frame):
    """Remember the first signal, and give a later one its usual effect."""
    now = time.monotonic()
    if now > min(stop_signals.values(), default=now) + 0.05:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    stop_signals.setdefault(signal.Signals(number).name, now)


for signal_name in 'SIGINT', 'SIGTERM', 'SIGHUP':
    number = getattr(signal, signal_name, None)  # Windows has no SIGHUP, and nohup has it ignored
    if number and signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, request_stop)

# -----------------------------------------------------------------------------
# training loop. Each iteration first evaluates and saves, then does a step; the last one only evaluates and
# saves: there are total_steps updates in total_steps + 1 iterations

print0(f'{n_examples} examples, {examples_per_step} per step; from step {first_step} to {total_steps}')
bar = tqdm(total=total_steps, initial=first_step, unit='step', disable=None if rank == 0 else True)
log_line = print0 if bar.disable else bar.write
model.train()
start_time = time.perf_counter()
last_save_time = start_time
save_is_due = False
was_stopped = False
first_loss = None
end_reason = ''
for step in range(first_step, total_steps + 1):

    # evaluate, at both ends of a run and every eval_interval steps, and keep the best model. A run that is
    # told to stop leaves the evaluation of its last step to the run that resumes it
    is_last_step = step == total_steps
    eval_is_due = step % eval_interval == 0 or is_last_step
    if eval_only or (eval_is_due and not was_stopped and progress['last_eval_step'] < step):
        train_loss = estimate_loss('train')
        val_loss = estimate_loss('val')
        was_stopped = val_loss is None
        if not was_stopped:
            log_line(f'step {step}/{total_steps} | train loss {train_loss:.4f} | val loss {val_loss:.4f}')
        if eval_only:
            break
        if not was_stopped:
            log_record(step=step, train_loss=train_loss, val_loss=val_loss)
            progress['val_loss'] = val_loss
            progress['last_eval_step'] = step
            if step > 0 and val_loss < progress['best_val_loss']:
                progress['best_val_loss'] = val_loss
                progress['evals_since_best'] = 0
                if keep_best:
                    save_model()
            elif step > 0:
                progress['evals_since_best'] += 1
                if progress['evals_since_best'] == 3:
                    log_line(f'warning: val loss has not fallen below {progress["best_val_loss"]:.4f} for '
                             'three evaluations; keep_best=True keeps that model, patience=3 stops here')

    # save: at the end, every save_interval steps or once an epoch, and every save_minutes
    if is_last_step:
        end_reason = f'all {total_steps} steps are done'
    elif was_stopped:
        end_reason = f'a signal came ({", ".join(stop_signals) or "to another process"})'
    elif 0 < patience <= progress['evals_since_best']:
        end_reason = f'val loss has not fallen in {patience} evaluations'
    epoch_ended = step > first_step and progress['examples_seen'] % n_examples == 0
    save_is_due = save_is_due or (step % save_interval == 0 if save_interval else epoch_ended)
    # a run that is stopped before its first step is saved, too: it can be resumed like any other. One that
    # was resumed, and has done no step since, has this state in ckpt.pt
    is_resumed = step == first_step and init_from == 'resume'
    if (end_reason and not is_resumed) or (save_is_due and step > first_step):
        save_checkpoint()
        last_save_time = time.perf_counter()
    if epoch_ended and sample_every_epoch and not was_stopped:
        show_answers()
    if end_reason:
        break

    # the examples of this step, fewer at the end of an epoch, and its learning rate. Dropout draws from the
    # step's own seed, so that a resumed run draws the same numbers
    step_time = time.perf_counter()
    epoch, place = divmod(progress['examples_seen'], n_examples)
    numbers = epoch_order(epoch)[place:place + examples_per_step]
    n_targets = n_targets_of[numbers].sum().item()
    n_tokens = n_tokens_of[numbers].sum().item()
    lr = get_lr(step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    if sampled_softmax:
        # the same vocabulary in each process
        torch.manual_seed(random_seed(step, 0))
        vocabulary = draw_vocabulary(numbers)
    torch.manual_seed(random_seed(step, rank))

    # forward and backward. The loss is the sum over the targets of the whole step, divided by their number:
    # it does not depend on how the examples are cut into micro-batches and processes
    loss = 0.0
    grad_norms.clear()
    micro_batches = np.array_split(numbers, gradient_accumulation_steps * world_size)[rank::world_size]
    for i, chunk in enumerate(micro_batches):
        is_last_micro_batch = i == len(micro_batches) - 1
        if shard:
            model.set_requires_gradient_sync(is_last_micro_batch)  # gradients are exchanged once per step
        elif world_size > 1:
            net.require_backward_grad_sync = is_last_micro_batch
        batch = get_batch('train', chunk)
        its_vocabulary = contextlib.nullcontext()  # all ids
        if sampled_softmax:
            its_vocabulary = smaller_vocabulary(vocabulary, batch)
        with its_vocabulary:
            with autocast:
                micro_loss = net(*batch, loss_reduction='sum') / n_targets
            # torch averages over processes, the sum is wanted
            scaler.scale(micro_loss * world_size).backward()
        loss += micro_loss.detach()
    # tokens that no row has are wrong in every step, and would drift together: they get no gradient
    if sampled_softmax and model.wte.weight.grad is not None:
        model.wte.weight.grad[vocabulary[~in_some_row[vocabulary]]] = 0.0
    # where blocks were updated in backward, what is left is mainly the embeddings
    update_parameters()

    # what all processes must agree on: the loss, signals that came in, whether it is time for a checkpoint
    minutes = (time.perf_counter() - last_save_time) / 60
    loss, n_signals, n_due = sum_over_processes(float(loss), len(stop_signals), minutes > save_minutes)
    was_stopped = n_signals > 0
    save_is_due = n_due > 0
    norm = torch.stack(grad_norms).norm().item()
    # an infinite norm is no fault where the scaler will halve its scale and skip the step
    scale_can_shrink = scaler.is_enabled() and scaler.get_scale() > 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or scale_can_shrink):
        # nothing of this step is saved
        advice = 'Start again with'
        if (out / 'ckpt.pt').exists():
            advice = 'The last checkpoint is kept. Resume it with'
        raise UserError(f'step {step + 1} has loss {loss} and gradient norm {norm}. {advice} a lower '
                        'learning_rate, or with grad_clip=1.0')
    # from here on the step counts: what is saved next is the state behind it
    progress['step'] = step + 1
    progress['examples_seen'] += len(numbers)
    first_loss = first_loss or loss
    if step == first_step + 10 and loss > 1.5 * first_loss:
        log_line(f'warning: the loss rose from {first_loss:.2f} to {loss:.2f} in the first steps; '
                 'the learning_rate may be too high')

    # log what was optimized: log.jsonl gets every step, a terminal a bar, other outputs about a hundred lines
    now = time.perf_counter()
    seconds = now - step_time
    fields = {'loss': loss, 'lr': lr, 'supervised_tokens': n_targets, 'tokens': n_tokens,
              'seconds': seconds, 'grad_norm': norm if math.isfinite(norm) else None}
    if scaler.is_enabled():  # where gradients overflow float16, the step is skipped and the scale halved
        fields['loss_scale'] = scaler.get_scale()
    log_record(step=step + 1, **fields)
    bar.set_postfix_str(f'loss {loss:.3f}, {n_tokens / seconds:.0f} tokens/s', refresh=False)
    bar.update()
    if bar.disable and (step + 1) % max(1, total_steps // 100) == 0:
        minutes_left = (now - start_time) / (step + 1 - first_step) * (total_steps - step - 1) / 60
        print0(f'step {step + 1}/{total_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | '
               f'{n_tokens / seconds:.0f} tokens/s | {seconds * 1000:.0f} ms | {minutes_left:.1f} min left')
bar.close()

# -----------------------------------------------------------------------------
# the end: the model of the last step, unless the best one is kept already, and what to do next

if not eval_only:
    if not keep_best or progress['best_val_loss'] == math.inf:
        save_model()
    if rank == 0:
        # what it has not written yet
        if logger == 'tensorboard':
            board.close()
        draw_losses(out / 'loss.png')
        about = read_json(out / f'{name}.json')
        val_loss = about['val_loss']
        arguments = [argument for argument in sys.argv[1:] if not argument.startswith('--init_from')]
        if was_stopped:
            # by as many processes, since a step has the same examples then
            command = 'python' if world_size == 1 else f'torchrun --nproc_per_node={world_size}'
            command += ' train.py'
            arguments.append('--init_from=resume')  # last: a config file sets init_from, too
        else:
            # config files serve all stages, most flags this one alone
            command = 'python sample.py'
            of_sample = '--out_dir', '--dataset', '--cache_dir', '--download_from', '--device'
            arguments = [argument for argument in arguments
                         if not argument.startswith('--') or argument.startswith(of_sample)]
        print(f'{"stopped at" if was_stopped else "finished"} step {progress["step"]}: {end_reason}')
        print(f'kept {out}/{name}.pth of step {about["step"]}, '
              f'val loss {"not measured" if val_loss is None else round(val_loss, 4)}')
        print('next:', command, shlex.join(arguments))
