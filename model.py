"""
GPT-2 in one file: the network, generation with a cache, and every way of loading one.

    model = GPT.from_pretrained('gpt2-medium')         # or a folder or file: OpenAI's, Hugging Face's, our own
    logits, _ = model(ids)                             # (B, T) -> (B, T, vocab)
    answers = model.generate([prompt_ids], 256)        # list of id lists -> list of new ids

B rows, T positions, C = n_embd channels, H heads of C/H channels.
"""
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from config import UserError
from weights import RELEASED, fetch_released, read_json, read_openai, unreadable

IGNORE = -100  # a target that is not supervised
CHUNK = 512  # supervised positions whose logits are held at once: 100 MB in fp32


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
        sizes = {(12, 768): 'gpt2-small124M', (24, 1024): 'gpt2-medium355M', (36, 1280): 'gpt2-large774M', (48, 1600): 'gpt2-xl1558M'}
        return sizes.get((self.n_layer, self.n_embd), f'gpt2-{self.n_layer}x{self.n_embd}')


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, 'n_embd must be a multiple of n_head'
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, attend):
        B, T, C = x.shape
        # three contiguous blocks, heads contiguous inside each
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, C/H)
                   for part in self.c_attn(x).split(C, dim=2))
        y = attend(q, k, v)  # (B, H, T, C/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))  # OpenAI's GELU; erf moves logits by 4e-4


class Block(nn.Module):

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

    def hidden(self, idx, positions, attends):
        """idx and positions (B, T), an attention function a block -> states before ln_f (B, T, C)."""
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block, attend in zip(self.h, attends):
            x = block(x, attend)
        return x

    def forward(self, idx, targets=None, positions=None, segments=None, denominator=0):
        """
        idx, targets, positions, segments: (B, T) -> (logits, loss). Without targets: logits (B, T, vocab), None. With:
        None, the cross-entropy in nats summed over the targets that are not -100 and divided by their number, or by
        `denominator`: the number in a whole step of several such calls. positions: default 0..T-1 in every row.
        segments: a query sees the keys before it of its own segment and of segment 0; default: all before it.
        """
        B, T = idx.shape
        assert T <= self.config.block_size or positions is not None, f'{T} positions, block_size is {self.config.block_size}'
        if positions is None:
            positions = torch.arange(T, device=idx.device).expand(B, T)
        mask = None
        if segments is not None:
            seen = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
            mask = seen.tril()[:, None]  # (B, 1, query, key)
        dropout = self.config.dropout if self.training else 0.0

        def attend(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)

        x = self.hidden(idx, positions, [attend] * len(self.h))
        if targets is None:
            return F.linear(self.ln_f(x), self.wte.weight), None
        # logits of prompts and pads are never made
        keep = targets != IGNORE
        x, targets = self.ln_f(x[keep]), targets[keep]
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK) if len(targets) > CHUNK else None
        loss = F.linear_cross_entropy(x, self.wte.weight, targets, reduction='sum', options=options)
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
            config, tensors = read_checkpoint(path)
            if where in RELEASED and config != GPTConfig(*RELEASED[where][0]):  # a file that no checksum covers
                wrong = path.with_name('hparams.json') if path.suffix == '.index' else path
                raise unreadable(wrong, f'it is not that of {where}')
            with torch.device('meta'):  # so that the random start is never made
                model = cls(replace(config, dropout=dropout))
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


def find_checkpoint(where):
    """A path -> the file that read_checkpoint takes; in a folder the newest of our own, else OpenAI's, else safetensors."""
    path = Path(where).expanduser()
    if path.is_file():
        return path
    for patterns in ('ckpt.pt', '*-sft.pth'), ('*.index',), ('*.safetensors.index.json',), ('*.safetensors',):
        found = [file for pattern in patterns for file in path.glob(pattern)]
        if found:
            return max(found, key=os.path.getmtime)
    fault = 'holds no ckpt.pt, *-sft.pth, model.ckpt.index or *.safetensors' if path.is_dir() else 'is no file or folder'
    raise UserError(f'{where} {fault}; a model is {", ".join(RELEASED)}, or the path to one')


def read_checkpoint(path):
    """-> (GPTConfig, (name, tensor) pairs in GPT's names and shapes, memory-mapped). Raises UserError."""
    if path.suffix == '.index':
        hparams = path.with_name('hparams.json')
        tensors = ((name, as_linear(name, torch.from_numpy(array))) for name, array in read_openai(path))
        return read_config(hparams, read_json(hparams)), tensors
    if path.name.endswith(('.safetensors', '.safetensors.index.json')):
        fields, tensors = read_safetensors(path)
    elif path.suffix in ('.pt', '.pth'):
        fields, tensors = read_own(path)
    else:
        raise UserError(f'{path} is no *.pth, *.pt, *.index or *.safetensors; a model is {", ".join(RELEASED)}, or a path')
    return read_config(path, fields, tensors), tensors.items()


def read_config(path, fields, tensors=None):
    """Fields in our, OpenAI's or Hugging Face's names; without any, tensors tell, and heads are 64 wide -> GPTConfig."""
    ours = {'n_ctx': 'block_size', 'n_positions': 'block_size', 'n_vocab': 'vocab_size'}
    try:
        fields = {ours.get(key, key): value for key, value in fields.items()}
        if not fields and tensors:
            fields['vocab_size'], fields['n_embd'] = tensors['wte.weight'].shape
            fields |= {'block_size': len(tensors['wpe.weight']), 'n_head': fields['n_embd'] // 64}
            fields['n_layer'] = 1 + max(int(name.split('.')[1]) for name in tensors if name.startswith('h.'))
        config = GPTConfig(*(int(fields[key]) for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')))
        if min(vars(config).values()) < 0 or config.n_embd % config.n_head:
            raise ValueError(f'{config.n_head} heads in a width of {config.n_embd}')
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise unreadable(path, f'it does not tell the shapes of a GPT-2 ({error})') from error
    return config


def as_linear(name, tensor):
    """OpenAI and Hugging Face store layers (in, out) -> the (out, in) view. No shape shows it: attn.c_proj is square."""
    return tensor.t() if '.c_' in name and name.endswith('weight') and tensor.dim() == 2 else tensor


def read_own(path):
    """A run's ckpt.pt, or a plain state dict with its .json beside it -> (fields of its GPTConfig, {name: tensor})."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # torch.load tells of no error in particular
        raise unreadable(path, str(error).split('. ')[0]) from error
    tensors = saved.get('model', saved) if isinstance(saved, dict) else {}
    if not tensors or not all(map(torch.is_tensor, tensors.values())):
        raise unreadable(path, 'it holds no state dict')
    fields, beside = saved.get('model_config', {}), path.with_suffix('.json')
    if not fields and beside.exists():
        fields = read_json(beside).get('model', {})
    return fields, tensors


def read_safetensors(path):
    """One file or the index of several, names with or without transformer. -> (config.json or {}, {name: tensor})."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f'{path} needs safetensors: pip install safetensors') from error
    tensors, shards = {}, {'': path.name}
    if path.suffix == '.json':
        shards = read_json(path).get('weight_map')
        if not isinstance(shards, dict) or not all(isinstance(name, str) and name for name in shards.values()):
            raise unreadable(path, 'its weight_map is not one of tensors and files')
    for file in sorted({path.with_name(name) for name in shards.values()}):
        try:
            with safe_open(file, 'pt') as opened:
                tensors |= {name.removeprefix('transformer.'): opened.get_tensor(name) for name in opened.keys()}
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error
    # the masks of causal attention are no weights
    tensors = {name: as_linear(name, tensor) for name, tensor in tensors.items()
               if not re.fullmatch(r'h\.\d+\.attn\.(masked_)?bias', name)}
    head = tensors.pop('lm_head.weight', None)
    if head is not None and not torch.equal(head, tensors.get('wte.weight', head)):
        raise UserError(f'{path}: lm_head.weight differs from wte.weight; in a GPT-2 they are one tensor')
    beside = path.with_name('config.json')
    fields = read_json(beside) if beside.exists() else {}
    # what Hugging Face's GPT-2 may vary and this one does not
    fixed = {'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
             'scale_attn_by_inverse_layer_idx': False}
    for key, value in fixed.items():
        if fields.get(key, value) != value:
            raise UserError(f'{beside}: {key} is {fields[key]!r}, and {value!r} in GPT-2 as it is here')
    return fields, tensors
