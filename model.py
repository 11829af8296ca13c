"""
GPT-2 in one file: the network, generation with a cache, and every way of loading one.

    model = GPT.from_pretrained('gpt2-medium')         # or a folder or file: OpenAI's, Hugging Face's, our own
    logits, _ = model(ids)                             # (B, T) -> (B, T, vocab)
    answers = model.generate([prompt_ids], 256)        # list of id lists -> list of new ids

B rows, T positions, C = n_embd channels, H heads of C/H channels.
"""
import atexit
import functools
import math
import os
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batch import IGNORE, packed_attention
from config import UserError
from weights import RELEASED, fetch_released, find_checkpoint, read_checkpoint, unreadable

CHUNK = 512  # supervised positions whose logits are held at once: 100 MB in fp32
PACK = 1024  # prompt positions that generate computes at once
STEP = 64  # positions by which its cache grows
SLOTS = 256  # rows it works on at once, at most
SPAN = 32  # positions, or rows, whose attention is one product, on a CPU: what is masked there is work for nothing
ONEDNN = torch.backends.mkldnn.is_available()


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
        sizes = {(12, 768): 'gpt2-small124M', (24, 1024): 'gpt2-medium355M',
                 (36, 1280): 'gpt2-large774M', (48, 1600): 'gpt2-xl1558M'}
        return sizes.get((self.n_layer, self.n_embd), f'gpt2-{self.n_layer}x{self.n_embd}')


def linear(x, weight, bias=None, gelu=False):
    """F.linear, and OpenAI's GELU after it; in a step of generation on a CPU by oneDNN, what torch.compile makes of it."""
    few = x.device.type == 'cpu' and x.dtype == weight.dtype == torch.float32 and x.numel() <= SLOTS * x.size(-1)
    if few and torch.is_inference_mode_enabled() and ONEDNN and not torch.is_autocast_enabled('cpu'):
        act, form = ('gelu', 'tanh') if gelu else ('none', '')
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], form)
    x = F.linear(x, weight, bias)
    return F.gelu(x, approximate='tanh') if gelu else x  # erf instead of tanh moves logits by 4e-4


class Linear(nn.Linear):

    def forward(self, x, gelu=False):
        return linear(x, self.weight, self.bias, gelu)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f'n_embd={config.n_embd} must be a multiple of n_head={config.n_head}')
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, attend, keep):
        B, T, C = x.shape
        # three contiguous blocks, heads contiguous inside each
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, C/H)
                   for part in self.c_attn(x).split(C, dim=2))
        y = attend(q, k, v)  # (B, H, T, C/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)[keep])


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        if isinstance(self.c_fc, Linear):
            return self.c_proj(self.c_fc(x, gelu=True))
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))  # LoRA's layers and those in 4 bits


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, attend, keep):
        x = x[keep] + self.drop(self.attn(self.ln_1(x), attend, keep))
        return x + self.drop(self.mlp(self.ln_2(x)))


class TiedEmbedding(torch.autograd.Function):
    """
    wte (vocab, C) and ids (B, T) -> the ids' rows (B, T, C), and wte for the output layer. The rows' gradient is added to
    the output layer's in place: left to itself, autograd makes a second tensor of wte's size of it, and a third of both.
    """

    @staticmethod
    def forward(ctx, wte, idx):
        ctx.save_for_backward(idx)
        return F.embedding(idx, wte), wte.view_as(wte)

    @staticmethod
    def backward(ctx, grad, grad_wte):
        idx, = ctx.saved_tensors
        # not index_put_, which adds in an order that depends on its threads
        return grad_wte.index_add_(0, idx.flatten(), grad.flatten(0, 1)), None


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # the output layer too: one tensor, so always tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif 'ln_' not in name:
                # residual projections are scaled by their number, so that depth does not grow the stream's variance
                std = 0.02 / math.sqrt(2 * config.n_layer) if 'c_proj' in name else 0.01 if 'wpe' in name else 0.02
                nn.init.normal_(p, std=std)

    def hidden(self, tokens, positions, attends, keep):
        """Embedded tokens (B, T, C), positions (B, T), an attention function a block -> states[keep] before ln_f."""
        x = self.drop(tokens + self.wpe(positions))
        for block, attend in zip(self.h, attends):
            # of the last block the others give keys and values, and nothing more is needed of them
            x = block(x, attend, keep if block is self.h[-1] else ...)
        return x

    def forward(self, idx, targets=None, positions=None, segments=None, denominator=0, each=False):
        """
        idx, targets, positions, segments: (B, T) -> (logits, loss). Without targets: logits (B, T, vocab), None. With:
        None, the cross-entropy in nats summed over the targets that are not -100 and divided by their number, or by
        `denominator`: the number in a whole step of several such calls; or `each` of them (N,), row by row.
        positions: default 0..T-1 in every row.
        segments: a query sees the keys before it of its own segment and of segment 0; default: all before it.
        """
        B, T = idx.shape
        assert T <= self.config.block_size or positions is not None, f'{T} positions, block_size is {self.config.block_size}'
        if positions is None:
            positions = torch.arange(T, device=idx.device).expand(B, T)
        dropout = self.config.dropout if self.training else 0.0
        attend = functools.partial(F.scaled_dot_product_attention, is_causal=True, dropout_p=dropout)
        if segments is not None:
            attend = packed_attention(segments, dropout)
        tokens, weight = TiedEmbedding.apply(self.wte.weight, idx)
        keep = ... if targets is None else (targets != IGNORE).nonzero(as_tuple=True)
        x = self.ln_f(self.hidden(tokens, positions, [attend] * len(self.h), keep))
        if targets is None:
            return F.linear(x, weight), None
        # logits of prompts and pads are never made, and those of many targets not all at once
        targets = targets[keep]
        if each:
            return None, F.linear_cross_entropy(x, weight, targets, reduction='none')
        if len(targets) > CHUNK and torch.is_autocast_enabled(x.device.type):
            # the fused form below would leave autocast, or sum in bfloat16
            loss = sum(checkpoint(F.linear_cross_entropy, part, weight, target, reduction='sum', use_reentrant=False)
                       for part, target in zip(x.split(CHUNK), targets.split(CHUNK)))
        else:
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK) if len(targets) > CHUNK else None
            loss = F.linear_cross_entropy(x, weight, targets, reduction='sum', options=options)
        return None, loss / (denominator or len(targets))

    # --- loading

    @classmethod
    def from_pretrained(cls, where, cache_dir='', weights='openai', dropout=0.0):
        """
        where: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path to a file or folder: OpenAI's, Hugging Face's, or our own.
        The names are downloaded once to cache_dir (empty: gpt2-sft in the user's cache), from 'openai' or 'huggingface', and
        from the other if that fails. -> a GPT in fp32 on the CPU, in training mode. UserError names the file or the tensor.
        """
        if weights not in ('openai', 'huggingface'):
            raise UserError(f"weights is 'openai' or 'huggingface', not {weights!r}")
        path = fetch_released(where, cache_dir, weights) if where in RELEASED else find_checkpoint(where)
        try:
            fields, tensors = read_checkpoint(path)
            config = GPTConfig(**fields, dropout=dropout)
            if where in RELEASED and tuple(fields.values()) != RELEASED[where][0]:  # in a file that no checksum covers
                wrong = path.with_name('hparams.json') if path.suffix == '.index' else path
                raise unreadable(wrong, f'it is not that of {where}')
            with torch.device('meta'):  # so that the random start is never made
                model = cls(config)
            model.to_empty(device='cpu').fill(tensors, path)
        except UserError as error:
            if where not in RELEASED or not hasattr(error, 'path'):
                raise
            error.path.unlink(missing_ok=True)
            raise UserError(f'{error}; it is removed: start again to download it anew') from error
        print(f'loaded {path} as {config.name}')
        return model

    @torch.no_grad()
    def fill(self, tensors, path):
        """(name, tensor) pairs of path -> the parameters of these names: every one, no others, of the same shapes."""
        left, kind = dict(self.named_parameters()), f'a GPT-2 of {self.config.n_layer} layers, width {self.config.n_embd}'
        for name, tensor in tensors:
            shape = tuple(tensor.shape)
            if name not in left:
                raise UserError(f'{path}: {name} {shape} is no tensor of {kind}')
            to = left.pop(name)
            if shape != to.shape or not tensor.is_floating_point():
                raise UserError(f'{path}: {name} is {shape} of {tensor.dtype}; in {kind} it is {tuple(to.shape)}')
            to.copy_(tensor)
        for name, to in left.items():
            raise UserError(f'{path}: {name} {tuple(to.shape)} of {kind} is missing, and {len(left) - 1} more')

    # --- generation

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, seed=0, eos=50256, on_done=None, cache_bytes=4e9):
        """
        prompts, lists of ids of any lengths -> lists of new ids in the same order, without the end-of-text (eos=-1: nothing
        ends a row early). A row also ends at max_new_tokens and at block_size; then, and only then, it has
        min(max_new_tokens, block_size - len(prompt)) ids. on_done(i, ids) is called as row i ends.
        temperature=0: greedy, the ids of one prompt at a time without a cache. Else each row draws from a stream of its own,
        set by seed and prompt, whatever the batch. Keys and values stay under cache_bytes (if those of one row do): the
        longest prompts begin, the others follow as rows end. Raises UserError if a prompt is empty or leaves no room.
        """
        block_size = self.config.block_size
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < block_size:
                raise UserError(f'prompt {i} has {len(prompt)} tokens; 1 to block_size - 1 = {block_size - 1} will do')
            if max(prompt) >= self.config.vocab_size:
                raise UserError(f'prompt {i} has token {max(prompt)}; this model knows {self.config.vocab_size} tokens')
        rows, answers = [list(prompt) for prompt in prompts], [[] for _ in prompts]  # a row is a prompt and its new ids
        streams = [np.random.default_rng((abs(seed), zlib.crc32(np.array(row, '<i8').tobytes()))) for row in rows]
        waiting = sorted(range(len(rows)), key=lambda i: len(rows[i])) if max_new_tokens > 0 else []
        active = []  # the row in each slot of the cache
        training = self.training
        self.eval()
        try:
            cache = Cache(self, os.path.commonprefix([row[:-1] for row in rows]), cache_bytes)
            while active or waiting:
                # prompts are computed in lots, when half of the slots are free, with room for STEP new ids each
                fit = cache.fit(max(len(rows[i]) for i in active + waiting[-1:]) + STEP)
                if waiting and len(active) <= fit // 2:
                    lot = [waiting.pop() for _ in range(min(fit - len(active), len(waiting)))]
                    logits = cache.admit([rows[i] for i in lot], [rows[i] for i in active])
                    active += lot
                else:
                    # rows that have outgrown the memory wait again, to be computed anew with the ids they have
                    fit = cache.fit(max(len(rows[i]) for i in active))
                    waiting += active[fit:]
                    lot = active = active[:fit]
                    logits = cache.step([rows[i] for i in active])
                for i, new in zip(lot, pick(logits, temperature, top_k, [streams[i].random() for i in lot])):
                    rows[i].append(new)
                for slot in reversed(range(len(active))):
                    i = active[slot]
                    if rows[i][-1] == eos or len(rows[i]) == min(len(prompts[i]) + max_new_tokens, block_size):
                        answers[i] = rows[i][len(prompts[i]):len(rows[i]) - (rows[i][-1] == eos)]
                        if on_done:
                            on_done(i, answers[i])
                        cache.move(len(active) - 1, slot)
                        active[slot] = active[-1]
                        active.pop()
        finally:
            self.train(training)
        return answers


class Cache:
    """
    What generate keeps of its rows, a tensor a block: `prefix` (2, H, P, C/H), the keys and values of the P ids that all
    rows begin with, held once; `own` (2, slots, H, room, C/H), those of the ids after them, a slot a row.
    """

    def __init__(self, model, prefix, limit):
        H, C = model.config.n_head, model.config.n_embd
        device, dtype = model.wte.weight.device, model.wte.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)  # what the layers' keys come in
        self.model, self.device, self.P = model, device, 0
        self.limit = limit / (2 * C * len(model.h) * dtype.itemsize)  # positions
        self.span = SPAN if device.type == 'cpu' else PACK
        self.prefix = [torch.zeros(2, H, 0, C // H, device=device, dtype=dtype) for _ in model.h]
        self.own = [torch.zeros(2, 0, H, 0, C // H, device=device, dtype=dtype) for _ in model.h]
        if prefix:
            self.admit([prefix])
            self.prefix = [own[:, 0, :, :len(prefix)].clone() for own in self.own]
            self.P = len(prefix)

    def room(self, length):
        return -((self.P - length) // STEP) * STEP  # positions for a row of `length` ids, in whole STEPs

    def fit(self, length):
        return min(SLOTS, max(1, int(self.limit / self.room(length))))  # rows of `length` ids

    def resize(self, slots, length):
        for i, own in enumerate(self.own):
            self.own[i] = F.pad(own, (0, 0, 0, self.room(length) - own.size(3), 0, 0, 0, slots - own.size(1)))

    def move(self, slot, to):
        for own in self.own if slot != to else ():
            own[:, to] = own[:, slot]

    def admit(self, rows, active=()):
        """Compute rows into the slots after those of the active -> logits (rows, vocab) of the id that follows each."""
        self.resize(len(active) + len(rows), max(map(len, [*rows, *active])))
        logits, pack = [], []
        for slot, row in enumerate(rows, len(active)):
            pack += [(slot, at, id) for at, id in enumerate(row[self.P:])]
            if len(pack) >= PACK or row is rows[-1]:
                logits.append(self.admit_pack(*torch.tensor(pack).unbind(1)))
                pack = []
        return torch.cat(logits)

    def admit_pack(self, slots, at, ids):
        """Rows back to back, without pads: ids (N,) at positions P + at of slots. Each sees the prefix and its own row."""
        order = torch.arange(len(ids))
        spans = []  # queries, the keys from where their first row begins, and which of the prefix and of those they see
        for a in range(0, len(ids), self.span):
            queries, keys = slice(a, a + self.span), slice(a - int(at[a]), a + self.span)
            seen = (slots[queries, None] == slots[keys]) & (order[queries, None] >= order[keys])
            spans.append((queries, keys, F.pad(seen, (self.P, 0), value=True).to(self.device)))

        def attend(i, q, k, v):
            y = []
            for queries, keys, seen in spans:
                kv = (torch.cat((far, near[0, :, keys]), 1)[None] for far, near in zip(self.prefix[i], (k, v)))
                y.append(F.scaled_dot_product_attention(q[:, :, queries], *kv, attn_mask=seen))
            return torch.cat(y, 2)  # (1, H, N, C/H)

        return self.run(slots, at, ids, attend, F.pad(slots[1:] != slots[:-1], (0, 1), value=True))

    def step(self, rows):
        """The last id of each row, in the slots' order -> logits (rows, vocab) of the id that follows."""
        lengths = [len(row) - self.P for row in rows]
        n, P, T = len(rows), self.P, max(lengths)
        if T > self.own[0].size(3) or n <= self.own[0].size(1) // 2:
            self.resize(n, P + T)
        at = torch.tensor(lengths) - 1
        unseen = F.pad(torch.arange(T) > at[:, None], (P, 0))[:, None, None].to(self.device)  # (n, 1, 1, P + T)
        # a span reads as far as its longest row: reading the cache is what takes the time
        spans = [(slice(a, a + self.span), slice(max(lengths[a:a + self.span]))) for a in range(0, n, self.span)]

        def attend(i, q, k, v):
            prefix, (keys, values) = self.prefix[i], self.own[i][:, :n]
            q = q[0] / math.sqrt(q.size(-1))  # (H, n, C/H)
            scores = q.new_full((n, q.size(0), 1, P + T), -math.inf)
            scores[..., :P] = (q @ prefix[0].transpose(1, 2)).transpose(0, 1)[:, :, None]  # one product a head for all rows
            q = q.transpose(0, 1)[:, :, None]  # (n, H, 1, C/H)
            for s, t in spans:
                scores[s, :, :, P:][..., t] = q[s] @ keys[s, :, t].transpose(2, 3)
            far, near = scores.masked_fill_(unseen, -math.inf).softmax(-1).to(v.dtype).split((P, T), -1)
            y = torch.cat([near[s][..., t] @ values[s, :, t] for s, t in spans])[:, :, 0].transpose(0, 1)
            return (y + far[:, :, 0].transpose(0, 1) @ prefix[1])[None]  # (1, H, n, C/H)

        return self.run(torch.arange(n), at, torch.tensor([row[-1] for row in rows]), attend, slice(None))

    def run(self, slots, at, ids, attend, last):
        """-> logits at `last` of the N positions. attend(block, q, k, v) is called after k and v are in the cache."""
        slots, at, ids = (x.to(self.device) for x in (slots, at, ids))

        def attend_block(i, q, k, v):  # (1, H, N, C/H)
            self.own[i][0][slots, :, at], self.own[i][1][slots, :, at] = k[0].transpose(0, 1), v[0].transpose(0, 1)
            return attend(i, q, k, v)

        attends = [functools.partial(attend_block, i) for i in range(len(self.own))]
        x = self.model.hidden(self.model.wte(ids[None]), self.P + at[None], attends, (0, last))
        return linear(self.model.ln_f(x), self.model.wte.weight)


def pick(logits, temperature, top_k, uniform):
    """logits (n, vocab) -> list of n ids: the largest, or where the cumulated probabilities pass uniform (n,)."""
    if temperature == 0:
        return logits.max(-1).indices.tolist()  # twice as fast as argmax
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(1)))
    cumulated = (logits.double() / temperature).softmax(-1).cumsum(-1)
    uniform = torch.tensor(uniform, device=logits.device)[:, None]
    chosen = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return (ids.gather(1, chosen) if top_k else chosen)[:, 0].tolist()


# --- the machine


def start_machine(device, dtype):
    """
    -> (torch.device, autocast context, rank, world). 'auto': cuda, mps or cpu; bfloat16 on cuda where it can, else float32.
    Started by torchrun, this joins the processes: nccl on cuda, gloo elsewhere. Raises UserError.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(device, local) if device == 'cuda' else torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device={device!r} is not to be had here: {str(error).splitlines()[0]}') from error
    if dtype == 'auto':
        dtype = 'bfloat16' if device.type == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
    if dtype not in ('float32', 'bfloat16'):
        raise UserError(f"dtype={dtype!r} is none of 'auto', 'float32', 'bfloat16'")
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        atexit.register(torch.distributed.destroy_process_group)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16'), rank, world
