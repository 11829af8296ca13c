"""
Fast generation: many prompts at once, with a KV cache, in sequences that join and leave between steps. This
file also chooses the device and the precision.

    answers = generate(model, prompts, 256)     # lists of ids -> the lists of new ids, in the same order

    device, dtype = choose_device('auto', 'auto')
    for_inference(model, device, dtype)         # before generate, where the model is not trained any further

In fp32 the new ids are those of GPT.generate. In one step every sequence that runs gets on: one that decodes
by one id, one whose prompt is still being read (prefill) by as many as the step has room for.

Shapes: B rows, T positions, C = n_embd channels, H heads of C/H channels, N positions of a step.
"""
import atexit
import ctypes
import os
import platform
from collections import deque
from pathlib import Path

from config import UserError
from model import MATRICES, ModelError, causal_attention, random_numbers, sample_token

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

EOS = 50256
VOCABULARY_CHUNK = 256  # tokens whose vectors are converted at once, see InferenceEmbedding
CACHE_GROWTH = 64  # positions by which the cache grows, so that it is not copied at every step

# -----------------------------------------------------------------------------
# the device, the precision, and the processes that share the work


def choose_device(device, dtype):
    """
    Settings -> (torch.device, torch.dtype). device 'auto': cuda, mps or cpu. dtype 'auto': on cuda bfloat16
    if the GPU has it, else float16; float32 elsewhere. Raises UserError.
    """
    name = device
    if device == 'auto':
        mps_or_cpu = 'mps' if torch.backends.mps.is_available() else 'cpu'
        name = 'cuda' if torch.cuda.is_available() else mps_or_cpu
    # each process of torchrun has a GPU of its own
    number = int(os.environ.get('LOCAL_RANK', 0)) if name == 'cuda' else None
    try:
        device = torch.device(name, number)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f'device={name!r} is not available here: {reason}') from error

    if dtype == 'auto' and device.type == 'cuda':
        # GPUs before Ampere, such as Colab's T4, only emulate bfloat16, and slowly
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    elif dtype == 'auto':
        dtype = 'float32'
    if device.type == 'mps' and dtype != 'float32':
        # causal attention in half precision has let positions see later ones there (pytorch issue 195910)
        raise UserError(f'dtype={dtype!r} is not safe on mps: set --dtype=float32')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if device.type == 'cpu':
        keep_freed_memory()
    return device, getattr(torch, dtype)


def join_processes(device):
    """Under torchrun join the other processes, by nccl on cuda, else by gloo: (rank, number of processes)."""
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    if world_size > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        atexit.register(dist.destroy_process_group)
    return int(os.environ.get('RANK', 0)), world_size


def keep_freed_memory():
    """
    glibc keeps what a step frees for the next one, instead of returning it to the system and having it mapped
    again: on a CPU a step of training takes less time (tests/bench.py --only=tricks).
    """
    if platform.libc_ver()[0] == 'glibc':
        M_TRIM_THRESHOLD = -1
        M_MMAP_MAX = -4
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)


def return_freed_memory():
    """Give the system back what keep_freed_memory has kept, where a server has nothing to do."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
HAS_FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines


def onednn_computes(dtype):
    """Whether oneDNN computes products in dtype on this CPU: bfloat16 takes instructions that AVX2 lacks."""
    if dtype == torch.bfloat16:
        return HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return HAS_ONEDNN and dtype == torch.float32


def is_intel():
    """Whether the processor is Intel's, for which MKL is made, the library behind F.linear."""
    try:
        return 'GenuineIntel' in Path('/proc/cpuinfo').read_text()
    except OSError:  # Linux alone has this file
        return 'GenuineIntel' in platform.processor()


MKL_ROWS = 3 if is_intel() else 0  # up to so many rows MKL takes less time than oneDNN in fp32


HAS_AMX = HAS_ONEDNN and getattr(torch.cpu, '_is_amx_tile_supported', bool)()


def cpu_linear(x, weight, bias=None):
    """
    F.linear by what takes the least time (tests/bench_decode.py): oneDNN, but for a few rows in fp32 MKL, and
    for one row in bfloat16 torch.mv, where oneDNN would take AMX, whose tiles are of 16 rows.
    """
    n_rows = x.numel() // x.size(-1)
    if x.dtype == torch.float32 and n_rows <= MKL_ROWS:
        return F.linear(x, weight, bias)
    if x.dtype == torch.bfloat16 and n_rows == 1 and HAS_AMX:
        row = x.flatten()
        y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return y.view(*x.shape[:-1], -1)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


class InferenceLinear(nn.Module):
    """
    A linear layer for inference, its matrix stored in dtype. On a CPU oneDNN or FBGEMM computes the product,
    in less time than F.linear (tests/bench.py --only=tricks).
    """

    def __init__(self, weight, bias, dtype):
        super().__init__()
        is_cpu = weight.device.type == 'cpu'
        uses_onednn = is_cpu and onednn_computes(dtype)
        self.dtype = dtype  # of what goes in and of what comes out
        weight = weight.detach()
        bias = bias.detach()
        if is_cpu and HAS_FBGEMM and dtype.itemsize == 2 and not uses_onednn:
            # only the matrix is in half precision: in float16, also where bfloat16 was asked for, as it takes
            # the same time and rounds less
            packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias.float())
            self.dtype = torch.float32
            self.product = lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
            return
        weight = weight.to(dtype)
        bias = bias.to(dtype)
        if uses_onednn:
            # in bfloat16 a product takes less time if the matrix has an order of oneDNN's own, which torch.mv
            # does not know; in fp32 it does not
            if dtype == torch.bfloat16 and not HAS_AMX:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
            self.product = lambda x: cpu_linear(x, weight, bias)
        else:
            self.product = lambda x: F.linear(x, weight, bias)

    def forward(self, x):  # (..., in) -> (..., out)
        return self.product(x.to(self.dtype))


class InferenceEmbedding(nn.Module):
    """
    The token vectors and the output layer for inference. Their matrix is kept once, not also in the order of
    a kernel: in Small's shape that copy would take a third more memory.
    """

    def __init__(self, embedding, dtype):
        super().__init__()
        is_cpu = embedding.weight.device.type == 'cpu'
        self.has_onednn = is_cpu and onednn_computes(dtype)
        self.is_converted = is_cpu and not self.has_onednn and dtype.itemsize == 2
        if self.is_converted:
            dtype = torch.float16  # see InferenceLinear
        self.weight = embedding.weight.detach().to(dtype)

    def forward(self, ids):  # (B, T) -> (B, T, C)
        return F.embedding(ids, self.weight)

    def unembed(self, x):  # (..., C) -> (..., vocab)
        n_positions = x.numel() // x.size(-1)
        if self.is_converted and n_positions > 4:
            # F.linear would convert the matrix anew for each position. It is converted once for all of them,
            # in chunks that the CPU's cache holds
            x = x.float()
            logits = []
            for chunk in self.weight.split(VOCABULARY_CHUNK):
                logits.append(F.linear(x, chunk.float()))
            return torch.cat(logits, dim=-1)
        linear = cpu_linear if self.has_onednn else F.linear
        return linear(x.to(self.weight.dtype), self.weight)


def for_inference(model, device, dtype):
    """
    Move the model to the device for inference, and store its matrices in dtype once. Norms, the sums of the
    residual stream and the positions stay in fp32, as under autocast, which would cast all matrices anew for
    every token. Returns the model, which cannot be trained any further.
    """
    model.to(device).eval().requires_grad_(False)
    for block in model.h:
        for name in MATRICES:
            layer = block.get_submodule(name)
            block.set_submodule(name, InferenceLinear(layer.weight, layer.bias, dtype))
    model.wte = InferenceEmbedding(model.wte, dtype)
    if device.type == 'cpu':
        return_freed_memory()  # of the fp32 matrices
    return model


# -----------------------------------------------------------------------------
# sequences, their cache, and which of them a step computes

def check_prompt(config, prompt, name='the prompt'):
    """ModelError: a prompt, as ids, is empty, leaves no room, or holds ids that a model of config lacks."""
    if not 0 < len(prompt) < config.block_size:
        raise ModelError(f'{name} has {len(prompt)} tokens; it may have 1 to {config.block_size - 1}')
    lowest = min(prompt)
    highest = max(prompt)
    if lowest < 0 or highest >= config.vocab_size:
        raise ModelError(
            f'{name} has ids from {lowest} to {highest}; the model has 0 to {config.vocab_size - 1}')


class Sequence:
    """
    A prompt that is being answered. ids: the prompt's, then the new ones. n_cached: how many of them have
    their keys and values in the cache. finish_reason: '' while it runs, then 'stop' at the end-of-text or
    'length'. config: of the model. ModelError: see check_prompt.
    """

    def __init__(
            self, config, prompt, max_new_tokens, temperature=0.0, top_k=0, seed=0, eos=EOS,
            name='the prompt'):
        check_prompt(config, prompt, name)
        # the prompt is the caller's list, which does not grow
        self.ids = list(prompt)
        self.n_prompt = len(prompt)
        self.n_cached = 0
        self.limit = min(len(prompt) + max_new_tokens, config.block_size)
        self.temperature = temperature
        self.top_k = top_k
        self.rng = random_numbers(prompt, seed)
        self.eos = eos
        self.finish_reason = ''

    @property
    def new_ids(self):
        """The ids that were generated, without the end-of-text."""
        end = len(self.ids)
        if self.finish_reason == 'stop':
            end -= 1
        return self.ids[self.n_prompt:end]

    @property
    def n_left(self):
        """How many of its ids have yet to be computed: 1 if it decodes, more in its prompt."""
        return len(self.ids) - self.n_cached

    def append(self, new_id):
        """Add an id that the model chose, and end the sequence if it was the last."""
        self.ids.append(new_id)
        if new_id == self.eos:
            self.finish_reason = 'stop'
        elif len(self.ids) == self.limit:
            self.finish_reason = 'length'


class KVCache:
    """Keys and values: a tensor (2, slots, H, length, C/H) for each layer. A sequence has a slot."""

    def __init__(self, config, device, dtype):
        head_size = config.n_embd // config.n_head
        shape = 2, 0, config.n_head, 0, head_size
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]

    def resize(self, n_slots, longest, limit):
        """Make room for n_slots sequences: for `longest` positions now, and never more than `limit`."""
        _, old_slots, n_head, old_length, head_size = self.layers[0].shape
        if n_slots <= old_slots and longest <= old_length <= limit + CACHE_GROWTH:
            return
        length = max(longest, min(longest + CACHE_GROWTH, limit))
        # what is in the cache stays, but for what a smaller one has no room for: it belongs to none
        slots = min(n_slots, old_slots)
        positions = min(length, old_length)
        for i, old in enumerate(self.layers):
            # one layer at a time, so that no second cache is needed
            new = old.new_zeros(2, n_slots, n_head, length, head_size)
            new[:, :slots, :, :positions] = old[:, :slots, :, :positions]
            self.layers[i] = new

    def write(self, slot, prefix):
        """Begin a slot with the keys and values (2, H, P, C/H) of a prefix, given for each layer."""
        for layer, its_prefix in zip(self.layers, prefix):
            layer[:, slot, :, :its_prefix.size(2)] = its_prefix

    def copy(self, source, target):
        """Copy the keys and values of one slot to another."""
        for layer in self.layers:
            layer[:, target] = layer[:, source]


class Scheduler:
    """
    Which sequences run, in the order of their slots, and how many ids of each a step computes. Those that
    decode come first; at most one, the last, is in the middle of its prompt.

    max_running: sequences at once; max_positions: the cache's, if every sequence ran to its limit; step_size:
    ids that a step computes, more than max_running. prefix: ids whose keys and values are known.
    """

    def __init__(self, max_running, max_positions, step_size, prefix):
        assert step_size > max_running
        self.max_running = max_running
        self.max_positions = max_positions
        self.step_size = step_size
        self.prefix = prefix
        self.waiting = deque()
        self.running = []

    def has_room(self, sequence):
        """Whether a sequence may join. The first one always may, or it would wait for ever."""
        if not self.running:
            return True
        n = len(self.running) + 1
        longest = max(other.limit for other in [sequence, *self.running])
        return n <= self.max_running and n * longest <= self.max_positions

    def schedule(self):
        """Let sequences join -> [(sequence, number of its ids to compute)] of all; those that joined."""
        n_prefix = len(self.prefix)
        room_to_join = self.step_size - sum(sequence.n_left for sequence in self.running)
        joined = []
        while room_to_join > 0 and self.waiting and self.has_room(self.waiting[0]):
            sequence = self.waiting.popleft()
            # at least one id behind the prefix is computed, as the next one depends on it
            if len(sequence.ids) > n_prefix and sequence.ids[:n_prefix] == self.prefix:
                sequence.n_cached = n_prefix
            room_to_join -= sequence.n_left
            self.running.append(sequence)
            joined.append(sequence)
        # each gets what it has left until the step is full; those that decode are first, and so always get it
        room = self.step_size
        batch = []
        for sequence in self.running:
            n_ids = min(sequence.n_left, room)
            room -= n_ids
            batch.append((sequence, n_ids))
        return batch, joined


class Engine:
    """
    Generates the sequences of one model. add() lets one wait, step() computes the next ids of those that
    run; one that has ended has left. prefix: ids with which many prompts begin, which are computed once.
    cache_bytes: of all keys and values. See Scheduler for max_running and step_size.
    """

    def __init__(self, model, prefix=(), cache_bytes=4e9, max_running=256, step_size=1024):
        self.model = model
        self.device = model.wpe.weight.device
        # the cache is in the precision in which the layers return keys and values
        layer = model.h[0].attn.c_attn
        dtype = getattr(layer, 'dtype', model.wpe.weight.dtype)
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        bytes_per_position = 2 * model.config.n_layer * model.config.n_embd * dtype.itemsize
        max_positions = cache_bytes / bytes_per_position
        self.scheduler = Scheduler(max_running, max_positions, step_size, list(prefix))
        self.cache = KVCache(model.config, self.device, dtype)
        self.prefix_cache = self.compute_prefix() if prefix else []

    @torch.no_grad()
    def compute_prefix(self):
        """The keys and values (2, H, P, C/H) of the prefix, for each layer."""
        layers = []

        def attention(q, k, v, dropout):  # (1, H, P, C/H)
            layers.append(torch.cat([k, v]))
            return causal_attention(q, k, v)

        ids = self.tensor(self.scheduler.prefix)
        self.prefix_hidden = self.model.hidden_states(ids[None], attention=attention)[0]  # (P, C)
        return layers

    def add(self, sequence):
        """Queue a sequence; it joins in one of the next steps."""
        self.scheduler.waiting.append(sequence)

    def has_work(self):
        """Whether another step would compute anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def remove(self, sequence):
        """Take out a sequence that runs or waits. No slot stays empty: the last sequence moves into it."""
        if sequence in self.scheduler.waiting:
            self.scheduler.waiting.remove(sequence)
            return
        running = self.scheduler.running
        slot = running.index(sequence)
        last = len(running) - 1
        sources = [last]
        # the last one stays last while it is in its prompt: the one before it fills the slot
        if running[last].n_left > 1 and slot < last - 1:
            sources = [last - 1, last]
        for source in sources:
            if source != slot:
                self.cache.copy(source, slot)
                running[slot] = running[source]
            slot = source
        running.pop()

    @torch.no_grad()
    def step(self):
        """
        Compute the next ids of the sequences that run, and choose a new id for those that are computed up to
        their end. Returns these sequences, and the logits (n, vocab) by which their ids were chosen.
        """
        batch, joined = self.scheduler.schedule()
        if not batch:
            return [], None
        sequences = self.scheduler.running
        longest = max(sequence.n_cached + n_ids for sequence, n_ids in batch)
        limit = max(sequence.limit for sequence in sequences)
        self.cache.resize(len(batch), longest, limit)
        for sequence in joined:
            if sequence.n_cached:
                self.cache.write(sequences.index(sequence), self.prefix_cache)
        logits = self.compute(batch)
        # one in the middle of its prompt gets no new id
        complete = [sequence for sequence in sequences if not sequence.n_left]
        for sequence, new_id in zip(complete, choose_ids(logits, complete)):
            sequence.append(new_id)
        for sequence in complete:
            if sequence.finish_reason:
                self.remove(sequence)
        return complete, logits

    def compute(self, batch):
        """
        Compute so many ids of each sequence, [(sequence, n_ids)] in the order of the slots, back to back in
        one row of N positions without pads -> the logits (n, vocab) behind those that are complete.
        """
        ids = []
        positions = []
        slots = []
        ends = []
        for slot, (sequence, n_ids) in enumerate(batch):
            start = sequence.n_cached
            end = start + n_ids
            ids += sequence.ids[start:end]
            positions += range(start, end)
            slots += [slot] * n_ids
            sequence.n_cached = end
            if not sequence.n_left:
                ends.append(len(ids) - 1)
        ids = self.tensor(ids)
        positions = self.tensor(positions)
        slots = self.tensor(slots)
        attention = self.cached_attention(batch, slots, positions)
        self.hidden = self.model.hidden_states(ids[None], positions[None], attention)[0]  # (N, C)
        return self.model.logits(self.hidden[self.tensor(ends)])

    def tensor(self, numbers):
        """A list of integers on the model's device; an empty one, too, must be of integers to index with."""
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def prompt_pieces(self, batch, n_decoding):
        """
        The pieces of prompts in a batch, which follow the sequences that decode, each as (slot, start, end,
        mask): start:end are its positions among the N of the step. mask (n_ids, n_seen): they see all that is
        in the cache, and of the piece itself what is before them.
        """
        pieces = []
        start = n_decoding
        for slot, (sequence, n_ids) in enumerate(batch[n_decoding:], n_decoding):
            n_seen = sequence.n_cached
            mask = torch.ones(n_ids, n_seen, dtype=torch.bool, device=self.device)
            pieces.append((slot, start, start + n_ids, mask.tril(n_seen - n_ids)))
            start += n_ids
        return pieces

    def cached_attention(self, batch, slots, positions):
        """
        An attention for GPT.hidden_states, which calls it once for each layer: it adds the keys and values of
        a step's N positions to the cache, and lets each position see the earlier ones of its sequence.
        """
        layers = iter(self.cache.layers)
        # those with one id come first, mostly because they decode; one call serves them all, each seeing as
        # far as its own position
        decoding = []
        for sequence, n_ids in batch:
            if n_ids != 1:
                break
            decoding.append(sequence)
        n = len(decoding)
        longest = max([sequence.n_cached for sequence in decoding], default=0)
        is_seen = torch.arange(longest, device=self.device) <= positions[:n, None, None, None]
        pieces = self.prompt_pieces(batch, n)

        def attention(q, k, v, dropout):  # (1, H, N, C/H)
            layer = next(layers)
            layer[0, slots, :, positions] = k[0].transpose(0, 1).to(layer.dtype)
            layer[1, slots, :, positions] = v[0].transpose(0, 1).to(layer.dtype)
            q = q.to(layer.dtype)  # a 4-bit layer returns fp32 under autocast
            found = []
            if decoding:
                queries = q[:, :, :n].transpose(0, 2)  # (n, H, 1, C/H)
                keys, values = layer[:, :n, :, :longest]
                y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=is_seen)
                found.append(y.transpose(0, 2))
            for slot, start, end, mask in pieces:
                n_seen = mask.size(1)
                keys, values = layer[:, slot, None, :, :n_seen]
                queries = q[:, :, start:end]
                found.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask))
            return torch.cat(found, dim=2)

        return attention


def choose_ids(logits, sequences):
    """logits (n, vocab) -> n ids. ModelError if the logits are not numbers: then the weights are broken."""
    highest, greedy = logits.max(dim=1)
    if not highest.isfinite().all():
        raise ModelError('the logits of this model are not numbers (nan): its weights are broken')
    new_ids = greedy.tolist()
    for i, sequence in enumerate(sequences):
        if sequence.temperature > 0:
            new_ids[i] = sample_token(
                logits[i], sequence.temperature, sequence.top_k, sequence.rng)
    return new_ids


def generate(
        model, prompts, max_new_tokens, temperature=0.0, top_k=0, seed=0, eos=EOS, on_done=None,
        cache_bytes=4e9):
    """
    prompts, lists of ids of any lengths -> the lists of new ids in the same order, without the end-of-text
    (eos=-1: nothing ends an answer early). An answer that meets its limit has exactly
    min(max_new_tokens, block_size - len(prompt)) ids. on_done(i, new_ids) is called as answer i ends.

    temperature 0: the likeliest id. seed: a number, or one for each prompt; an answer's random numbers depend
    on it and on the prompt alone. ModelError: a prompt is empty or leaves no room.
    """
    # label.py asks a prompt several times, each time with another seed
    seeds = seed if isinstance(seed, list) else [seed] * len(prompts)
    # what cannot be answered is refused before anything is computed
    sequences = []
    for i, prompt in enumerate(prompts):
        sequences.append(Sequence(
            model.config, prompt, max_new_tokens, temperature, top_k, seeds[i], eos, f'prompt {i}'))
    if not sequences or max_new_tokens < 1:
        return [[] for _ in sequences]
    number_of = {sequence: i for i, sequence in enumerate(sequences)}
    was_training = model.training
    model.eval()
    try:
        # what all prompts begin with is computed once; a single one is computed whole
        prefix = []
        if len(prompts) > 1:
            prefix = os.path.commonprefix([prompt[:-1] for prompt in prompts])
        engine = Engine(model, prefix, cache_bytes)
        # the longest prompts first: at the end, what runs together is of a length
        for sequence in sorted(sequences, key=lambda sequence: -len(sequence.ids)):
            engine.add(sequence)
        while engine.has_work():
            complete, _ = engine.step()
            for sequence in complete:
                if sequence.finish_reason and on_done:
                    on_done(number_of[sequence], sequence.new_ids)
    finally:
        model.train(was_training)
    return [sequence.new_ids for sequence in sequences]
