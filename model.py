"""
GPT-2 in one file: the network, generation with a KV cache, and every way of loading the weights.

    model = GPT.from_pretrained('gpt2-medium')     # or a folder or file: OpenAI's, Hugging Face's, our own
    logits, _ = model(ids)                         # (B, T) -> (B, T, vocab)
    answers = model.generate([prompt_ids], 256)    # list of id lists -> list of lists of new ids

It needs torch and numpy; for OpenAI's files google-crc32c, for Hugging Face's safetensors, for downloads
requests and tqdm. In shapes: B rows, T positions, C = n_embd channels, H heads of C/H channels.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that is not supervised
LOGITS_CHUNK = 512  # supervised positions whose logits are held at once: 100 MB in fp32
PREFILL_CHUNK = 1024  # prompt positions, about, that a prefill computes at once
MAX_ROWS = 256  # rows that generate works on at once, at most
CACHE_GROWTH = 64  # positions by which the KV cache grows
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')

class ModelError(Exception):
    """What the user can mend. config/__init__.py prints an error that has an exit_code in one line."""
    exit_code = 2

class CorruptFile(ModelError):
    """A file whose content is wrong: a checksum, a size, a format or a shape says so."""
    def __init__(self, path, reason):
        super().__init__(f'cannot read {path}: ' + (str(reason) or type(reason).__name__).splitlines()[0])
        self.path = path

# --- the network

def linear(x, weight, bias=None):
    """F.linear; for the few rows of generation on a CPU by oneDNN: one prompt takes 18 % less time."""
    is_fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
    few_rows = torch.is_inference_mode_enabled() and x.numel() <= MAX_ROWS * x.size(-1)
    if ONEDNN and is_fp32 and few_rows and x.device.type == 'cpu':
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)

class Linear(nn.Linear):
    """nn.Linear by the function above. x (..., in) -> (..., out)."""
    def forward(self, x):
        return linear(x, self.weight, self.bias)

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ModelError(f'n_embd={config.n_embd} must be a multiple of n_head={config.n_head}')
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, attend):
        """x (B, T, C) -> (B, T, C). attend(q, k, v), each (B, H, T, C/H), is masked or cached attention."""
        B, T, C = x.size()
        # q, k, v are three contiguous blocks of channels, the heads contiguous inside each
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C)
        q, k, v = (x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for x in (q, k, v))
        y = attend(q, k, v)  # (B, H, T, C/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    """x (B, T, C) -> (B, T, C), through a hidden layer four times as wide."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # OpenAI's GELU is the tanh approximation; the exact one moves logits by 4e-4
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))

class Block(nn.Module):
    """Pre-norm: what attention and the MLP make of the normalized x is added to x. (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, attend):
        x = x + self.drop(self.attn(self.ln_1(x), attend))
        return x + self.drop(self.mlp(self.ln_2(x)))

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    @property
    def name(self):
        """gpt2-medium355M for OpenAI's shapes, else gpt2-<layers>x<width>: what files are called after."""
        names = {(12, 768): 'gpt2-small124M', (24, 1024): 'gpt2-medium355M',
                 (36, 1280): 'gpt2-large774M', (48, 1600): 'gpt2-xl1558M'}
        return names.get((self.n_layer, self.n_embd), f'gpt2-{self.n_layer}x{self.n_embd}')

def segment_mask(segments):
    """segments (B, T) -> (B, 1, T, T): a query sees keys up to itself, of its own segment or segment 0."""
    keys = segments[:, None, :]
    return ((segments[:, :, None] == keys) | (keys == 0)).tril()[:, None]

class GPT(nn.Module):
    """The whole network, in GPT-2's parameter names. The output layer is wte: one tensor, always tied."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's initialization: 0.02, less for positions and, so that depth does not grow the sum, for what
        # is added to the residual stream
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif 'ln_' not in name:
                nn.init.normal_(p, std=0.01 if name == 'wpe.weight' else 0.02)

    def hidden_states(self, idx, positions, attend_of):
        """ids and positions (B, T), an attend(q, k, v) for each layer -> (B, T, C), before ln_f."""
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block, attend in zip(self.h, attend_of):
            x = block(x, attend)
        return x

    def forward(self, idx, targets=None, positions=None, segments=None, loss_reduction='mean'):
        """
        idx, targets, positions, segments: (B, T) -> (logits, loss): without targets (B, T, vocab) and None;
        with them None and the cross-entropy in nats over those that are not -100, their 'mean' or 'sum', or
        for 'none' that of each, (N,), row by row. Default positions: 0..T-1; segments: plainly causal.
        """
        B, T = idx.size()
        assert positions is not None or T <= self.config.block_size, f'{T} positions are over block_size'
        if positions is None:
            positions = torch.arange(T, device=idx.device).expand(B, T)
        # packed rows need a mask; a plainly causal one is built into the kernel
        mask = None if segments is None else segment_mask(segments)
        attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None,
                                   dropout_p=self.config.dropout if self.training else 0.0)
        x = self.hidden_states(idx, positions, [attend] * len(self.h))
        if targets is None:
            return self.output_layer(self.ln_f(x)), None
        # only supervised positions reach the output layer: the logits of prompts and pads are never made
        supervised = targets != IGNORE
        losses = self.target_losses(self.ln_f(x[supervised]), targets[supervised])
        if loss_reduction == 'none':
            return None, losses
        return None, losses.mean() if loss_reduction == 'mean' else losses.sum()

    def output_layer(self, x):
        """States behind ln_f (..., C) -> logits (..., vocab)."""
        return linear(x, self.wte.weight)

    def target_losses(self, x, targets):
        """States behind ln_f (N, C), targets (N,) -> cross-entropy in nats of each target (N,), in fp32."""
        if len(targets) > LOGITS_CHUNK:
            # so many logits are not held at once: those of a chunk are computed again in backward
            chunks = zip(x.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK))
            return torch.cat([checkpoint(self.target_losses, *c, use_reentrant=False) for c in chunks])
        logits = self.output_layer(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # under autocast they are half
        return F.cross_entropy(logits, targets, reduction='none')

    @classmethod
    def from_pretrained(cls, where, cache_dir='', weights='openai', dropout=0.0, mapped=False):
        """
        where: a name of RELEASED, or the path of OpenAI's, Hugging Face's or our own file or folder. Names
        are downloaded once to cache_dir (empty: gpt2-sft in the user's cache), first from `weights`. mapped:
        no copy is made. -> a GPT in fp32 on the CPU, in training mode. ModelError names what is at fault.
        """
        if weights not in ('openai', 'huggingface'):
            raise ModelError(f"weights is 'openai' or 'huggingface', not {weights!r}")
        path = fetch_released(where, cache_dir, weights) if where in RELEASED else find_checkpoint(where)
        try:
            fields, tensors = read_checkpoint(path)
            if where in RELEASED and GPTConfig(**fields) != RELEASED[where][0]:
                wrong = path.with_name('hparams.json') if path.suffix == '.index' else path
                raise CorruptFile(wrong, f'it is not that of {where}')
            with torch.device('meta'):  # no memory and no random numbers for weights that are overwritten
                model = cls(GPTConfig(**fields, dropout=dropout)).to_empty(device='cpu')
            model.load_weights(tensors, path, mapped)
        except CorruptFile as error:
            if where not in RELEASED:
                raise
            error.path.unlink(missing_ok=True)
            raise ModelError(f'{error}; it is removed: start again to download it') from error
        print(f'loaded {path} as {model.config.name}')
        return model

    @torch.no_grad()
    def load_weights(self, tensors, path, mapped=False):
        """Copy or map (name, tensor) pairs of path to the parameters: all, in their shapes, and no others."""
        # one tensor at a time, so that a memory-mapped file is never in memory twice
        missing = dict(self.named_parameters())
        kind = f'a GPT-2 of {self.config.n_layer} layers, width {self.config.n_embd}'
        for name, tensor in tensors:
            found = f'{path}: {name} is {tuple(tensor.shape)} of {tensor.dtype}'
            if name not in missing:
                raise ModelError(f'{found}; {kind} has no such tensor')
            p = missing.pop(name)
            if tensor.shape != p.shape or not tensor.is_floating_point():
                raise ModelError(f'{found}; in {kind} it is {tuple(p.shape)}')
            if mapped:
                p.data = tensor.float()  # the memory of the file
            else:
                p.copy_(tensor)
        if missing:
            raise ModelError(f'{path}: {", ".join(missing)[:200]} of {kind} is missing')

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, seed=0, eos=50256, on_done=None,
                 cache_bytes=4e9, samples=1):
        """
        prompts, lists of ids of any lengths -> lists of new ids in the same order, without the end-of-text
        (eos=-1: nothing ends a row early). A row that ends at a limit has exactly min(max_new_tokens,
        block_size - len(prompt)) new ids. on_done(i, new ids) is called as row i ends. temperature=0: greedy,
        in fp32 the ids of one prompt at a time without a cache. Else a row draws random numbers set by seed
        and prompt, whatever the batch. samples=n: each prompt has n rows, one after the other, with seeds
        seed, seed + 1, ... Rows over cache_bytes wait. ModelError: a prompt is empty or leaves no room.
        """
        # what cannot be answered is refused before anything is computed
        rows = [Row(self.config, prompt, max_new_tokens, temperature, top_k, seed + n, eos, f'prompt {i}')
                for i, prompt in enumerate(prompts) for n in range(samples)]
        if not rows or max_new_tokens < 1:
            return [[] for _ in rows]
        waiting = sorted(rows, key=lambda row: len(row.ids))
        was_training = self.training
        self.eval()
        try:
            # what all prompts begin with is computed once; of a single one all of it is prefilled at once
            prefix = os.path.commonprefix([row.ids[:-1] for row in rows]) if len(prompts) > 1 else []
            cache = KVCache(self, prefix, cache_bytes)
            max_rows = max(1, cache.max_rows(max(row.limit for row in rows)) // samples) * samples
            while waiting or cache.rows:
                # prefill while half of the slots are free, the longest prompts first; else decode
                n_free = max_rows - len(cache.rows) if len(cache.rows) <= max_rows // 2 else 0
                joining = [waiting.pop() for _ in range(min(n_free // samples * samples, len(waiting)))]
                for row in cache.step(joining)[0]:
                    if row.finish_reason and on_done:
                        on_done(rows.index(row), row.answer)
        finally:
            self.train(was_training)
        return [row.answer for row in rows]

# --- generation

class Row:
    """A prompt that is being answered. ids: its own, then the new ones. finish_reason: '' until it has ended,
    then 'stop' at the end-of-text or 'length'. config: of the model; the other arguments are generate's."""
    def __init__(self, config, prompt, max_new_tokens, temperature=0.0, top_k=0, seed=0, eos=50256,
                 name='the prompt'):
        if not 0 < len(prompt) < config.block_size:
            raise ModelError(f'{name} has {len(prompt)} tokens; it may have 1 to {config.block_size - 1}')
        if max(prompt) >= config.vocab_size:
            raise ModelError(f'{name} has token {max(prompt)} of {config.vocab_size}')
        self.ids, self.prompt_size, self.finish_reason = list(prompt), len(prompt), ''
        self.limit = min(len(prompt) + max_new_tokens, config.block_size)
        self.temperature, self.top_k, self.eos = temperature, top_k, eos
        self.rng = np.random.default_rng((seed % 2**32, zlib.crc32(np.array(prompt, '<i8').tobytes())))

    @property
    def answer(self):
        """-> the new ids, without the end-of-text."""
        return self.ids[self.prompt_size:-1 if self.finish_reason == 'stop' else None]

class KVCache:
    """
    Keys and values of the rows that are being generated, which may join and leave between steps. `rows`: the
    row in each slot; all begin with the P ids of `prefix`. `kv_cache`: a tensor (2, slots, H, padded length,
    C/H) per layer; `prefix_cache` (2, H, P, C/H): those of the prefix, which new slots get copies of.
    """
    def __init__(self, model, prefix, max_bytes=4e9):
        H, C = model.config.n_head, model.config.n_embd
        device, dtype = model.wpe.weight.device, model.wpe.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)  # in which the layers return keys and values
        self.model, self.device, self.rows, self.P = model, device, [], 0
        self.max_positions = max_bytes / (2 * C * len(model.h) * dtype.itemsize)
        self.kv_cache = [torch.zeros(2, 0, H, 0, C // H, device=device, dtype=dtype) for _ in model.h]
        self.prefix_cache = []
        if prefix:  # it is computed once, as a row of its own
            self.prefill([Row(model.config, prefix, 0)])
            self.prefix_cache = [kv[:, 0, :, :len(prefix)].clone() for kv in self.kv_cache]
            self.rows, self.P = [], len(prefix)

    def max_rows(self, limit):
        """-> how many rows fit, should each become `limit` ids long, so that none has to leave early."""
        return min(MAX_ROWS, max(1, int(self.max_positions / limit)))

    def step(self, joining):
        """Prefill the rows that join, or if none do decode: a new id for each. Rows that have ended leave.
        -> these rows, and the logits (rows, vocab) by which their ids were chosen."""
        batch = joining or list(self.rows)
        logits = self.prefill(joining) if joining else self.decode_step()
        for row, new_id in zip(batch, sample_tokens(logits, batch)):
            row.ids.append(new_id)
            if new_id == row.eos or len(row.ids) == row.limit:
                row.finish_reason = 'stop' if new_id == row.eos else 'length'
                self.evict(row)
        return batch, logits

    def resize(self):
        """Give each row a slot, and each slot the positions of the longest row and more, so that it lasts."""
        longest, limit = max(len(row.ids) for row in self.rows), max(row.limit for row in self.rows)
        _, old_slots, _, old_length, _ = self.kv_cache[0].shape
        fits, slots = longest <= old_length <= limit + CACHE_GROWTH, len(self.rows)
        length = old_length if fits else min(longest + CACHE_GROWTH, limit)
        if length != old_length or slots > old_slots:
            for layer, kv in enumerate(self.kv_cache):
                self.kv_cache[layer] = F.pad(kv, (0, 0, 0, length - old_length, 0, 0, 0, slots - old_slots))

    def evict(self, row):
        """Free the row's slot; the last row moves there, so that the first slots are those in use."""
        slot = self.rows.index(row)
        for kv in self.kv_cache:
            kv[:, slot] = kv[:, len(self.rows) - 1]
        self.rows[slot] = self.rows[-1]
        del self.rows[-1]

    def prefill(self, rows):
        """Compute the ids of rows into new slots -> logits (rows, vocab) of the id that follows each."""
        first, self.rows = len(self.rows), self.rows + rows
        self.resize()
        for kv, prefix_kv in zip(self.kv_cache, self.prefix_cache):
            kv[:, first:len(self.rows), :, :self.P] = prefix_kv[:, None]
        # the first of equal rows is computed, whole rows at once, about a chunk of positions
        slot_of = {}
        source = [slot_of.setdefault(tuple(row.ids), slot) for slot, row in enumerate(rows, first)]
        chunk = np.cumsum([len(ids) - self.P for ids in slot_of]) // PREFILL_CHUNK
        chunks = np.split(list(slot_of.values()), np.flatnonzero(np.diff(chunk)) + 1)
        logits = torch.cat([self.prefill_chunk(slots) for slots in chunks])
        if len(slot_of) == len(rows):
            return logits
        for kv in self.kv_cache:  # the others get copies
            kv[:, first:len(self.rows)] = kv[:, source]
        return logits[np.searchsorted(list(slot_of.values()), source)]

    def prefill_chunk(self, slots):
        """Compute the rows of these slots, packed back to back into one of N positions, without a pad."""
        P, own_ids = self.P, [self.rows[slot].ids[self.P:] for slot in slots]
        lengths = [len(ids) for ids in own_ids]
        ends, T = np.cumsum(lengths).tolist(), max(lengths)
        idx = torch.tensor([sum(own_ids, [])], device=self.device)  # (1, N)
        positions = torch.tensor([[P + i for n in lengths for i in range(n)]], device=self.device)
        mask = torch.ones(T, P + T, dtype=torch.bool, device=self.device).tril(P)

        def attend(layer, q, k, v):  # (1, H, N, C/H)
            kv, y = self.kv_cache[layer], []
            for slot, n, end in zip(slots, lengths, ends):
                # a row of n positions sees the prefix and itself
                row, seen = slice(end - n, end), mask[:n, :P + n]
                kv[0, slot, :, P:P + n], kv[1, slot, :, P:P + n] = k[0, :, row], v[0, :, row]
                keys, values = kv[:, slot:slot + 1, :, :P + n]  # (1, H, P + n, C/H)
                y.append(F.scaled_dot_product_attention(q[:, :, row], keys, values, attn_mask=seen))
            return torch.cat(y, dim=2)  # (1, H, N, C/H)

        return self.logits(idx, positions, attend, torch.tensor(ends, device=self.device) - 1)

    def decode_step(self):
        """The last id of every row -> logits (rows, vocab) of the id that follows it."""
        n, T = len(self.rows), max(len(row.ids) for row in self.rows)
        if T > self.kv_cache[0].size(3):
            self.resize()
        # each row's last id, its place in the cache, and the places that it sees
        slots = torch.arange(n, device=self.device)
        places = torch.tensor([len(row.ids) - 1 for row in self.rows], device=self.device)
        idx = torch.tensor([row.ids[-1] for row in self.rows], device=self.device)
        seen = torch.arange(T, device=self.device) <= places[:, None, None, None]  # (n, 1, 1, T)

        def attend(layer, q, k, v):  # (n, H, 1, C/H)
            kv = self.kv_cache[layer]
            # a 4-bit layer returns fp32 under autocast
            kv[0, slots, :, places] = k[:, :, 0].to(kv.dtype)
            kv[1, slots, :, places] = v[:, :, 0].to(kv.dtype)
            keys, values = kv[:, :n, :, :T]  # (n, H, T, C/H)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)

        return self.logits(idx[:, None], places[:, None], attend, slots)

    def logits(self, idx, positions, attend, last):
        """ids and positions (B, T) -> logits (n, vocab) of the n positions `last`, counted over all B T."""
        attend_of = [functools.partial(attend, layer) for layer in range(len(self.kv_cache))]
        x = self.model.hidden_states(idx, positions, attend_of).flatten(0, 1)  # (B T, C)
        return self.model.output_layer(self.model.ln_f(x[last]))

def sample_tokens(logits, rows):
    """logits (n, vocab) -> n ids: a row's likeliest, or where the cumulated probability passes its number."""
    new_ids = logits.max(dim=1).indices
    for i, row in enumerate(rows):
        if row.temperature > 1e-6:  # less is greedy: fp32 could not divide by it
            chances, ids = logits[i].topk(min(row.top_k, logits.size(1))) if row.top_k else (logits[i], None)
            cumulated = (chances.float() / row.temperature).softmax(dim=0).cumsum(dim=0)
            chosen = torch.searchsorted(cumulated, row.rng.random() * cumulated[-1:], right=True)
            chosen = chosen.clamp(max=len(cumulated) - 1)  # in fp32 a number may round to the whole sum
            new_ids[i] = chosen if ids is None else ids[chosen]
    return new_ids.tolist()

# --- checkpoints: which file, and what is in it

def find_checkpoint(where):
    """A path -> its file; in a folder our newest model, or our checkpoint, OpenAI's, safetensors."""
    if (path := Path(where).expanduser()).is_file():
        return path
    for pattern in '*-sft.pth', 'ckpt.pt', '*.index', '*.safetensors.index.json', '*.safetensors':
        if found := list(path.glob(pattern)):
            return max(found, key=os.path.getmtime)
    raise ModelError(f'{where} is no checkpoint, nor a folder with *-sft.pth, ckpt.pt, model.ckpt.index or '
                     f'*.safetensors; a model is {", ".join(RELEASED)}, or the path to one')

def read_checkpoint(path):
    """-> (fields of GPTConfig, (name, tensor) pairs in GPT's names and shapes). Raises ModelError."""
    if path.suffix == '.index':
        hparams = path.with_name('hparams.json')
        return config_fields(hparams, read_json(hparams)), read_openai(path)
    if path.name.endswith(('.safetensors', '.safetensors.index.json')):
        fields, tensors = read_safetensors(path)
    elif path.suffix in ('.pt', '.pth'):
        fields, tensors = read_own(path)
    else:
        raise ModelError(f'{path} is no *.pth, *.pt, *.index or *.safetensors')
    return config_fields(path, fields, tensors), tensors.items()

def config_fields(path, fields, tensors=None):
    """Fields in our, OpenAI's or Hugging Face's names, or without any the tensors -> fields of GPTConfig."""
    ours = {'n_ctx': 'block_size', 'n_positions': 'block_size', 'n_vocab': 'vocab_size'}
    with reading(path, 'it does not tell the shapes of a GPT-2'):
        fields = {ours.get(key, key): value for key, value in fields.items()}
        # a state dict alone tells all but the number of heads, which are 64 wide in all of OpenAI's
        if not fields and tensors:
            vocab_size, n_embd = tensors['wte.weight'].shape
            n_layer = 1 + max(int(name.split('.')[1]) for name in tensors if name.startswith('h.'))
            fields = {'block_size': len(tensors['wpe.weight']), 'vocab_size': vocab_size, 'n_layer': n_layer,
                      'n_head': n_embd // 64, 'n_embd': n_embd}
        fields = {key: int(fields[key]) for key in 'block_size vocab_size n_layer n_head n_embd'.split()}
        if min(fields.values()) < 1 or fields['n_embd'] % fields['n_head']:
            raise ValueError(f'{fields["n_head"]} heads in a width of {fields["n_embd"]}')
    return fields

def transpose_conv1d(name, tensor):
    """OpenAI and Hugging Face store layers (in, out) -> (out, in). The square c_proj does not show it."""
    return tensor.t() if '.c_' in name and name.endswith('weight') and tensor.dim() == 2 else tensor

@contextlib.contextmanager
def reading(path, fault=''):
    """Errors while path is read: the system's become ModelError, those of the content CorruptFile."""
    try:
        yield
    except OSError as error:
        raise ModelError(f'cannot read {path}: {error.strerror or error}') from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CorruptFile(path, f'{fault} ({error})' if fault else error) from error

def read_json(path):
    with reading(path):
        return dict(json.loads(path.read_text(encoding='utf-8')))

def read_own(path):
    """A run's ckpt.pt, or a plain state dict with its .json beside it -> (fields, {name: tensor})."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # torch.load documents no exception class
        raise CorruptFile(path, str(error).split('. ')[0]) from error
    tensors = saved.get('model', saved) if isinstance(saved, dict) else {}
    if not tensors or not all(map(torch.is_tensor, tensors.values())):
        raise CorruptFile(path, 'it holds no state dict')
    if 'model_config' in saved:
        return saved['model_config'], tensors
    beside = path.with_suffix('.json')
    return read_json(beside).get('model', {}) if beside.exists() else {}, tensors

def read_safetensors(path):
    """One file, or the index of several; names with or without transformer. -> (fields, {name: tensor})."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ModelError(f'{path} needs safetensors: pip install safetensors') from error
    files = {path}
    if path.suffix == '.json':
        with reading(path, 'its weight_map is not one of tensors and files'):
            files = {path.with_name(file) for file in read_json(path)['weight_map'].values()}
    tensors = {}
    for file in sorted(files):
        try:
            with reading(file), safe_open(file, 'pt') as opened:
                for name in opened.keys():
                    tensors[name.removeprefix('transformer.')] = opened.get_tensor(name)
        except SafetensorError as error:
            raise CorruptFile(file, error) from error
    # the masks of causal attention are no weights
    tensors = {name: transpose_conv1d(name, t) for name, t in tensors.items()
               if not name.endswith(('.attn.bias', '.attn.masked_bias'))}
    # older files hold the tied output layer twice
    head = tensors.pop('lm_head.weight', None)
    if head is not None and not torch.equal(head, tensors.get('wte.weight', head)):
        raise ModelError(f'{path}: lm_head.weight differs from wte.weight; in a GPT-2 they are one tensor')
    beside = path.with_name('config.json')
    fields = read_json(beside) if beside.exists() else {}
    # what Hugging Face's GPT-2 may vary and this one does not
    for key, value in (('activation_function', 'gelu_new'), ('layer_norm_epsilon', 1e-5),
                       ('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False)):
        if fields.get(key, value) != value:
            raise ModelError(f'{beside}: {key} is {fields[key]!r}; this GPT-2 has {value!r}')
    return fields, tensors

# --- OpenAI's checkpoints without TensorFlow: files of raw floats, and an index, a LevelDB table of protobuf
# messages (leveldb/doc/table_format.md, tensorflow/core/protobuf/tensor_bundle.proto), all with checksums

def masked_crc(data):
    try:
        from google_crc32c import value
    except ImportError as error:
        raise ModelError("OpenAI's files need google-crc32c: pip install google-crc32c") from error
    crc = value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

def varint(data, offset):
    """Seven bits a byte, low first, the eighth says that more follow -> (number, offset after it)."""
    number = shift = 0
    while data[offset] > 127:
        number |= (data[offset] & 127) << shift
        offset, shift = offset + 1, shift + 7
    return number | data[offset] << shift, offset + 1

def parse_message(data):
    """A protobuf message -> {field: its values}, numbers for varints and fixed32, bytes for the rest."""
    fields, offset = {}, 0
    while offset < len(data):
        tag, offset = varint(data, offset)
        wire_type = tag & 7
        if wire_type == 0:
            value, offset = varint(data, offset)
        elif wire_type == 2:
            size, offset = varint(data, offset)
            value, offset = data[offset:offset + size], offset + size
        elif wire_type == 5:
            value, offset = int.from_bytes(data[offset:offset + 4], 'little'), offset + 4
        else:
            raise ValueError(f'it has a field of wire type {wire_type}')
        fields.setdefault(tag >> 3, []).append(value)
    return fields

def read_block(data, handle):
    """A table, the handle of a block (varints offset, size) -> yields its (key, value) pairs. ValueError."""
    offset, after = varint(handle, 0)
    size, _ = varint(handle, after)
    end = offset + size
    kind, crc = data[end], int.from_bytes(data[end + 1:end + 5], 'little')
    if kind or masked_crc(data[offset:end + 1]) != crc:
        raise ValueError(f'the block at {offset} is compressed (type {kind}), or its checksum differs')
    # the block is its entries, then restart points and their number, which serve binary search
    block = data[offset:end]
    stop = size - 4 - 4 * int.from_bytes(block[-4:], 'little')
    key, i = b'', 0
    while i < stop:
        # an entry: the bytes it shares with the key before it, the rest of its key, its value
        shared, i = varint(block, i)
        unshared, i = varint(block, i)
        length, i = varint(block, i)
        key, i = key[:shared] + block[i:i + unshared], i + unshared + length
        yield key, block[i - length:i]

def read_index(path):
    """-> ({variable: its BundleEntryProto, field 2 as a list of dimensions}, number of data files)."""
    with reading(path):
        data, entries = path.read_bytes(), {}
        if len(data) < 48 or data[-8:] != 0xDB4775248B80FB57.to_bytes(8, 'little'):
            raise ValueError('it does not end as an index does')
        # the footer: offset and size of the metaindex, which is empty, then the handle of the index block
        _, offset = varint(data, len(data) - 48)
        _, offset = varint(data, offset)
        for _, handle in read_block(data, data[offset:]):
            entries |= {key.decode(): parse_message(value) for key, value in read_block(data, handle)}
        header = entries.pop('', {})
        if 1 not in header or 2 in header:
            raise ValueError('it has no header, or a big-endian one')
        for name, entry in entries.items():
            if entry.get(1) != [1]:
                raise ValueError(f'{name} is of type {entry.get(1)}, not float32')
            dimensions = parse_message(entry[2][0]).get(2, []) if 2 in entry else []
            entry[2] = [parse_message(dimension).get(1, [0])[0] for dimension in dimensions]
    return entries, header[1][0]

def read_openai(path):
    """OpenAI's model.ckpt.index -> yields (name, tensor), GPT's names and shapes, verified, memory-mapped."""
    last_part = {'w': 'weight', 'g': 'weight', 'b': 'bias', 'wte': 'wte.weight', 'wpe': 'wpe.weight'}
    entries, shards = read_index(path)
    for variable, entry in entries.items():
        shape, shard, offset, size, crc = entry[2], *(entry.get(field, [0])[0] for field in (3, 4, 5, 6))
        file = path.with_name(f'{path.stem}.data-{shard:05d}-of-{shards:05d}')
        with reading(file):
            # mapped again for each tensor, so that the pages of finished ones do not stay in memory
            raw = np.memmap(file, np.uint8, 'c')[offset:offset + size]
            if not len(raw) == size == 4 * math.prod(shape):
                raise ValueError(f'{variable} {shape} has {size} bytes, of which {len(raw)} are there')
            if masked_crc(raw) != crc:
                raise ValueError(f'the checksum of {variable} differs')
        array = np.require(raw.view('<f4'), requirements='A')  # offsets need not be multiples of 4
        # model/h0/ln_1/g is h.0.ln_1.weight; layers are (1, in, out), as for convolutions of width 1
        *parts, last = re.sub(r'^h(\d)', r'h/\1', variable.removeprefix('model/')).split('/')
        name = '.'.join([*parts, last_part.get(last, last)])
        array = array.reshape(shape[-2:] if shape[:1] == [1] else shape)
        yield name, transpose_conv1d(name, torch.from_numpy(array))

# --- the released weights, downloaded once

RELEASED = {  # shape; OpenAI's folder, bytes of data, of index; Hugging Face's bytes and sha256, where known
    'gpt2': (GPTConfig(n_layer=12, n_head=12, n_embd=768), '124M', 497_759_232, 5_215,
             548_105_171, '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
    'gpt2-medium': (GPTConfig(n_layer=24, n_head=16, n_embd=1024), '355M', 1_419_292_672, 10_399,
                    0, 'fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd'),
    'gpt2-large': (GPTConfig(n_layer=36, n_head=20, n_embd=1280), '774M', 3_096_120_320, 15_535, 0, ''),
    'gpt2-xl': (GPTConfig(n_layer=48, n_head=25, n_embd=1600), '1558M', 6_230_444_800, 20_724, 0, ''),
}
OPENAI = ('https://openaipublic.blob.core.windows.net/gpt-2/models',
          'https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2')
HUGGING_FACE = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/') + '/openai-community'
RETRY_WAITS = 0, 1, 2, 4  # seconds before each try of an address
TIMEOUT = 10, 30  # seconds to connect, and without a byte

def fetch_released(name, cache_dir='', weights='openai'):
    """A name of RELEASED -> OpenAI's index or Hugging Face's safetensors, downloaded unless in the cache."""
    default = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'gpt2-sft')
    folder = Path(cache_dir or default, name).expanduser()
    _, base, data_bytes, index_bytes, safetensors_bytes, sha256 = RELEASED[name]
    sizes = {'hparams.json': 0, 'model.ckpt.data-00000-of-00001': data_bytes, 'model.ckpt.index': index_bytes}
    # the arguments of download for the files of each source; the last file is the one to read
    sources = {
        'openai': [([f'{url}/{base}/{f}' for url in OPENAI], folder / f, size) for f, size in sizes.items()],
        'huggingface': [([f'{HUGGING_FACE}/{name}/resolve/main/model.safetensors'],
                         folder / 'model.safetensors', safetensors_bytes, sha256)]}
    if (folder / 'model.safetensors').exists() and not all((folder / file).exists() for file in sizes):
        weights = 'huggingface'  # an earlier start had to fall back to it
    # the preferred source first, then the other
    faults = []
    for source in sorted(sources, key=lambda source: source != weights):
        try:
            return [download(*file) for file in sources[source]][-1]
        except ModelError as error:
            print(f'{source}: {error}', flush=True)
            faults.append(str(error))
    raise ModelError('; '.join(faults))

def file_fault(path, size, sha256):
    """-> what is wrong with a downloaded file, or ''. Some servers send a web page for what is not there."""
    if size and path.stat().st_size != size:
        return f'{path.stat().st_size:,} bytes instead of {size:,}'
    with open(path, 'rb') as file:
        if sha256 and hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
            return f'another sha256 than {sha256}'
        if not size and not sha256 and file.read(1) in (b'', b'<'):
            return 'a web page in it, or nothing'
    return ''

def download(urls, path, size=0, sha256=''):
    """
    Fetch path from the first of urls that gives it, unless it is there and right. Written to path.part and
    renamed when whole; if size (bytes) or sha256 is given, a partial file is resumed. Time-outs, 5xx, 429 and
    broken connections are retried with back-off, all else goes to the next address. Processes that write to
    one folder take turns. ModelError lists every address and its fault.
    """
    import requests
    from filelock import FileLock  # torch depends on it
    path, faults = Path(path), []
    try:
        # looked for before the lock too, since a cache may be read-only
        if path.exists() and not file_fault(path, size, sha256):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name('.lock')):
            if path.exists() and not file_fault(path, size, sha256):  # another process has just downloaded it
                return path
            # waiting helps against a busy server or a broken connection, not against a wrong address
            for url in urls:
                for wait in RETRY_WAITS:
                    time.sleep(wait)
                    try:
                        return fetch(url, path, size, sha256)
                    except (ModelError, ValueError, requests.exceptions.SSLError) as error:
                        fault = error
                        break
                    except requests.RequestException as error:
                        fault = getattr(error.args[0] if error.args else error, 'reason', error)
                faults.append(f'{url}: {fault}')
    except OSError as error:
        raise ModelError(f'cannot write {path}: {error.strerror or error}') from error
    raise ModelError(f'cannot download {path.name}: ' + '; '.join(faults))

def fetch(url, path, size, sha256):
    """One try of download: the rest of path.part if the server sends just that, else the whole file."""
    import requests
    from tqdm import tqdm
    part, tty = path.with_name(path.name + '.part'), sys.stderr.isatty()
    have = part.stat().st_size if (size or sha256) and part.exists() else 0
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        status, content_range = reply.status_code, reply.headers.get('Content-Range', '')
        if status == 416 or status == 206 and not content_range.startswith(f'bytes {have}-'):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f'the partial file cannot be resumed ({status} {content_range})')
        if status not in (200, 206, 408, 429) and status < 500:
            raise ModelError(f'HTTP {status}')
        reply.raise_for_status()
        have = have if status == 206 else 0  # 200: the server knows no ranges and sends the whole file
        total = have + int(reply.headers.get('Content-Length', size - have))
        if size and total != size:
            raise ModelError(f'{total:,} bytes instead of {size:,}')
        # a bar on a terminal; in a log a line for every tenth
        bar = tqdm(None, path.name, total or None, initial=have, unit='B', unit_scale=True, disable=not tty)
        with bar, open(part, 'ab' if have else 'wb') as file:
            for chunk in reply.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
                tenths, have = have * 10 // max(total, 1), have + len(chunk)
                if not tty and total and have * 10 // total > tenths:
                    print(f'{path.name}: {have:,} of {total:,} bytes', flush=True)
    if have < size:
        raise requests.ConnectionError(f'the connection broke after {have:,} of {size:,} bytes')
    if fault := file_fault(part, size, sha256):
        part.unlink()
        raise ModelError(fault)
    os.replace(part, path)
    return path

