"""
GPT-2 in one file: the network, its loss, a plain way to generate, and every way of loading the weights.

    model = GPT.from_pretrained('gpt2-medium')     # or a path: OpenAI's, Hugging Face's, nanoGPT's, our files
    logits = model(ids)                            # (B, T) -> (B, T, vocab)
    loss = model(ids, targets)                     # the mean cross-entropy, in nats
    new_ids = model.generate(ids, 256)             # engine.py gives the same ids, faster

Copied alone into an empty folder it works with torch and numpy, and where a file needs it google-crc32c
(OpenAI's), safetensors (Hugging Face's), requests, tqdm and filelock (downloads).

Shapes: B rows, T positions, C = n_embd channels, H heads of C/H channels.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target without loss, as in torch
LOGITS_CHUNK = 512  # positions whose logits are in memory at once: 100 MB in fp32

# -----------------------------------------------------------------------------
# the network


def causal_attention(q, k, v, dropout=0.0):
    """q, k, v (B, H, T, C/H) -> (B, H, T, C/H): each position attends to itself and to those before it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def packed_attention(segments):
    """
    The attention of packed rows. segments (B, T): a position attends to those before it in its own segment
    and in segment 0, the prefix that the examples of a row share.
    """
    keys = segments[:, None, :]
    mask = ((segments[:, :, None] == keys) | (keys == 0)).tril()[:, None]  # (B, 1, T, T)

    def attention(q, k, v, dropout=0.0):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attention


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, 'the heads share the channels equally'
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, attention=causal_attention):
        """x (B, T, C) -> (B, T, C). attention: causal_attention, or one that masks or caches otherwise."""
        B, T, C = x.size()
        # q, k, v are three contiguous blocks of channels, the heads contiguous inside each
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, C/H)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = attention(q, k, v, self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # OpenAI's GELU is the tanh approximation; the exact one moves logits by 4e-4
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, attention=causal_attention):
        x = x + self.drop(self.attn(self.ln_1(x), attention))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class TiedEmbedding(nn.Embedding):
    """The token vectors, which are the rows of the output layer, too."""

    def logits(self, x):
        """x (..., C) -> (..., vocab)."""
        return F.linear(x, self.weight)


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
        """What files are called after: gpt2-medium355M for OpenAI's shapes, else gpt2-<layers>x<width>."""
        names = {(12, 768): 'gpt2-small124M', (24, 1024): 'gpt2-medium355M',
                 (36, 1280): 'gpt2-large774M', (48, 1600): 'gpt2-xl1558M'}
        return names.get((self.n_layer, self.n_embd), f'gpt2-{self.n_layer}x{self.n_embd}')


def random_numbers(ids, seed):
    """The random numbers of one answer: set by its prompt and the seed, whatever is computed beside it."""
    return np.random.default_rng((seed % 2**32, zlib.crc32(np.array(ids, '<i8').tobytes())))


def sample_token(logits, temperature, top_k, rng):
    """logits (vocab,) -> an id: the likeliest at temperature 0, else drawn, from top_k likeliest or all."""
    if temperature < 1e-6:  # fp32 could not divide by it
        return logits.argmax().item()
    logits = logits.float() / temperature
    if top_k:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    # the id at which the cumulated probability reaches a random number above 0 and up to 1
    cumulated = logits.softmax(dim=0).cumsum(dim=0)
    return torch.searchsorted(cumulated, cumulated[-1] * (1 - rng.random())).item()


class GPT(nn.Module):
    """The whole network, in GPT-2's parameter names. There is no lm_head: the output layer is wte itself."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = TiedEmbedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self):
        """GPT-2's initialization: std 0.02, 0.01 for positions, and biases of zero."""
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                # less for what is added to the residual stream, so that depth does not grow the sum
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name == 'wpe.weight':
                nn.init.normal_(p, std=0.01)
            elif 'ln_' not in name:
                nn.init.normal_(p, std=0.02)

    def hidden_states(self, ids, positions=None, attention=causal_attention):
        """ids and their positions (B, T) -> what the blocks make of them (B, T, C), before the last norm."""
        if positions is None:
            assert ids.size(1) <= self.config.block_size, f'{ids.size(1)} positions are over block_size'
            positions = torch.arange(ids.size(1), device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for block in self.h:
            x = block(x, attention)
        return x

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., vocab)."""
        return self.wte.logits(self.ln_f(x))

    def token_losses(self, x, targets, candidates=None):
        """
        Hidden states (N, C) and targets (N,) -> the cross-entropy of each (N,), in nats, at least in fp32.
        candidates: (ids (V,), biases (V,)), the tokens among which the softmax chooses; None: all.
        """
        if len(targets) > LOGITS_CHUNK:
            # so many logits are not kept: backward computes those of a chunk again
            losses = [checkpoint(self.token_losses, *chunk, candidates, use_reentrant=False)
                      for chunk in zip(x.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK))]
            return torch.cat(losses)
        if candidates is None:
            logits = self.logits(x)
        else:
            ids, biases = candidates
            logits = F.linear(self.ln_f(x), self.wte(ids)) + biases
            targets = torch.searchsorted(ids, targets)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # under autocast they are half
        return F.cross_entropy(logits, targets, reduction='none')

    def forward(self, ids, targets=None, positions=None, segments=None, loss_reduction='mean',
                candidates=None):
        """
        ids (B, T) -> logits (B, T, vocab). With targets (B, T): the cross-entropy of those that are not
        IGNORE, in nats, as their 'mean' or 'sum', or with 'none' each of them (N,), row by row.

        positions (B, T): by default 0 to T - 1. segments (B, T): of packed rows, see packed_attention.
        candidates: see token_losses; their ids are sorted, and all targets are among them.
        """
        attention = causal_attention if segments is None else packed_attention(segments)
        x = self.hidden_states(ids, positions, attention)
        if targets is None:
            return self.logits(x)
        # prompts and pads have no loss, so their logits are never made
        has_loss = targets != IGNORE
        losses = self.token_losses(x[has_loss], targets[has_loss], candidates)
        if loss_reduction == 'none':
            return losses
        return losses.mean() if loss_reduction == 'mean' else losses.sum()

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=0.0, top_k=0, seed=0, eos=50256):
        """
        A prompt's ids (a list) -> the list of new ids, up to an end-of-text, which is left out. This is the
        definition: engine.generate gives the same ids, of many prompts at once, with a cache.
        """
        rng = random_numbers(ids, seed)
        new_ids = []
        while len(new_ids) < max_new_tokens and len(ids) + len(new_ids) < self.config.block_size:
            logits = self(torch.tensor([ids + new_ids], device=self.wte.weight.device))[0, -1]
            next_id = sample_token(logits, temperature, top_k, rng)
            if next_id == eos:
                break
            new_ids.append(next_id)
        return new_ids

    @classmethod
    def from_pretrained(cls, where, cache_dir='', download_from='openai', dropout=0.0, mapped=False,
                        vocab_size=None):
        """
        where: a name of RELEASED, or the path of a file or folder: OpenAI's, Hugging Face's, nanoGPT's,
        chapter 7's or our own. Returns a GPT in fp32 on the CPU, in training mode.

        cache_dir: where a name's files are kept (empty: gpt2-sft in the user's cache); download_from: whose
        are tried first. mapped: leave the weights in the file, read-only. vocab_size: leave out the ids from
        this one on, which some models have beyond their tokenizer's. ModelError names what is at fault.
        """
        if where in RELEASED:
            path = fetch_released(where, cache_dir, download_from)
        else:
            path = find_checkpoint(where)
        try:
            fields, tensors = read_checkpoint(path)
            config = GPTConfig(**fields, dropout=dropout)
            if where in RELEASED and replace(config, dropout=0.0) != RELEASED[where].config:
                wrong = path.with_name('hparams.json') if path.suffix == '.index' else path
                raise CorruptFile(wrong, f'it is not that of {where}')
            if vocab_size is not None:
                config.vocab_size = min(config.vocab_size, vocab_size)
            with torch.device('meta'):  # no memory and no random numbers for weights that are overwritten
                model = cls(config).to_empty(device='cpu')
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
            if name == 'wte.weight':
                tensor = tensor[:self.config.vocab_size]
            if tensor.shape != p.shape or not tensor.is_floating_point():
                raise ModelError(f'{found}; in {kind} it is {tuple(p.shape)}')
            if mapped:
                p.data = tensor.float()
            else:
                p.copy_(tensor)
        if missing:
            raise ModelError(f'{path}: {", ".join(missing)[:200]} of {kind} is missing')


def fingerprint(tensors):
    """
    {name: tensor} -> 64 hex digits that tell these weights from others: the sha256 of names, shapes and up to
    4,096 values of each tensor. Any training changes it, and 1.5 billion weights take a tenth of a second.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {list(tensor.shape)}'.encode())
        values = tensor.detach().flatten()
        some = values[::max(1, len(values) // 4096) | 1]  # an odd step, so that it meets all columns
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# checkpoints: which file, and what is in it

class ModelError(Exception):
    """What the user can mend. config/__init__.py prints an error that has an exit_code in one line."""
    exit_code = 2


class CorruptFile(ModelError):
    """A file whose content is wrong: a checksum, a size, a format or a shape says so."""

    def __init__(self, path, reason):
        reason = str(reason) or type(reason).__name__
        super().__init__(f'cannot read {path}: {reason.splitlines()[0]}')
        self.path = path


@contextlib.contextmanager
def reading(path, fault=''):
    """Errors while path is read: the system's become ModelError, those of the content CorruptFile."""
    try:
        yield
    except OSError as error:
        raise ModelError(f'cannot read {path}: {error.strerror or error}') from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CorruptFile(path, f'{fault} ({error})' if fault else error) from error


def find_checkpoint(where):
    """A path -> its file; of a folder the newest of our models, else a checkpoint, OpenAI's, safetensors."""
    path = Path(where).expanduser()
    if path.is_file():
        return path
    for pattern in '*-sft.pth', 'ckpt.pt', '*.index', '*.safetensors.index.json', '*.safetensors':
        found = list(path.glob(pattern))
        if found:
            return max(found, key=os.path.getmtime)
    raise ModelError(f'{where} is not a checkpoint, nor a folder with *-sft.pth, ckpt.pt, model.ckpt.index '
                     f'or *.safetensors; a model is one of {", ".join(RELEASED)}, or the path to one')


def read_checkpoint(path):
    """(fields of GPTConfig, (name, tensor) pairs in GPT's names and shapes). Raises ModelError."""
    if path.suffix == '.index':
        hparams = path.with_name('hparams.json')
        return config_fields(hparams, read_json(hparams)), read_openai(path)
    if path.name.endswith(('.safetensors', '.safetensors.index.json')):
        fields, tensors = read_safetensors(path)
    elif path.suffix in ('.pt', '.pth'):
        fields, tensors = read_torch(path)
    else:
        raise ModelError(f'{path} is not a *.pth, *.pt, *.index or *.safetensors')
    with reading(path, 'it does not hold the weights of a GPT-2'):
        tensors = without_output_layer(path, tensors)
        if not fields:
            fields = guess_fields(tensors)
    return config_fields(path, fields), tensors.items()


def config_fields(path, fields):
    """Fields in our, OpenAI's or Hugging Face's names -> those of GPTConfig."""
    ours = {'n_ctx': 'block_size', 'n_positions': 'block_size', 'n_vocab': 'vocab_size'}
    with reading(path, 'it does not tell the shapes of a GPT-2'):
        fields = {ours.get(key, key): value for key, value in fields.items()}
        names = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'
        fields = {name: int(fields[name]) for name in names}
        if min(fields.values()) < 1 or fields['n_embd'] % fields['n_head']:
            raise ValueError(f'{fields["n_head"]} heads in a width of {fields["n_embd"]}')
    return fields


def guess_fields(tensors):
    """A state dict tells all but the number of heads, which is known for OpenAI's widths."""
    vocab_size, n_embd = tensors['wte.weight'].shape
    n_heads = {768: 12, 1024: 16, 1280: 20, 1600: 25}
    if n_embd not in n_heads:
        raise ValueError(f'a width of {n_embd} has no usual number of heads: '
                         'put {"model": {...}} with its shapes into a .json of the same name beside it')
    layers = {name.split('.')[1] for name in tensors if name.startswith('h.')}
    return {'block_size': len(tensors['wpe.weight']), 'vocab_size': vocab_size, 'n_layer': len(layers),
            'n_head': n_heads[n_embd], 'n_embd': n_embd}


def without_output_layer(path, tensors):
    """Some files hold the tied output layer, too, or instead of wte, or the masks of attention."""
    tensors = {name: tensor for name, tensor in tensors.items()
               if not name.endswith(('.attn.bias', '.attn.masked_bias'))}
    head = tensors.pop('lm_head.weight', None)
    if head is not None and not torch.equal(head, tensors.setdefault('wte.weight', head)):
        raise ModelError(f'{path}: its output layer differs from its token embedding; in a GPT-2 they are '
                         'one tensor, so this model cannot be loaded')
    return tensors


def transpose_conv1d(name, tensor):
    """OpenAI and Hugging Face store layers (in, out) -> (out, in). The square c_proj does not show it."""
    is_layer = '.c_' in name and name.endswith('weight') and tensor.dim() == 2
    return tensor.t() if is_layer else tensor


def read_json(path):
    with reading(path):
        return dict(json.loads(path.read_text(encoding='utf-8')))


def read_torch(path):
    """A run's ckpt.pt, nanoGPT's, or a state dict with its .json beside it -> (fields, {name: tensor})."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # torch.load documents no exception class
        raise CorruptFile(path, str(error).split('. ')[0]) from error
    tensors = {}
    if isinstance(saved, dict):  # chapter 7's own saving has the third name
        tensors = saved.get('model') or saved.get('model_state_dict') or saved
    if not tensors or not all(map(torch.is_tensor, tensors.values())):
        raise CorruptFile(path, 'it does not hold a state dict')
    if 'trf_blocks.0.att.W_query.weight' in tensors:
        tensors = rename_chapter_7(tensors)
    tensors = {name.removeprefix('_orig_mod.').removeprefix('transformer.'): tensor
               for name, tensor in tensors.items()}
    if any(name.endswith('.A') for name in tensors):
        raise ModelError(f'{path} holds the matrices of LoRA alone: load the *-sft.pth beside it')
    if 'model_config' in saved:
        return saved['model_config'], tensors
    if 'model_args' in saved:
        return saved['model_args'], with_biases(tensors)
    beside = path.with_suffix('.json')
    return read_json(beside).get('model', {}) if beside.exists() else {}, tensors


def with_biases(tensors):
    """nanoGPT trains without biases by default, which is the same as with biases of zero."""
    for name, tensor in list(tensors.items()):
        bias = name.replace('.weight', '.bias')
        if name.startswith(('h.', 'ln_f.')) and bias not in tensors:
            tensors[bias] = torch.zeros(len(tensor))
    return tensors


def rename_chapter_7(tensors):
    """The state dict of "Build a Large Language Model From Scratch", with q, k, v apart, in GPT's names."""
    names = {'tok_emb': 'wte', 'pos_emb': 'wpe', 'final_norm': 'ln_f', 'out_head': 'lm_head',
             'trf_blocks': 'h', 'norm1': 'ln_1', 'norm2': 'ln_2', 'att.out_proj': 'attn.c_proj',
             'ff.layers.0': 'mlp.c_fc', 'ff.layers.2': 'mlp.c_proj', 'scale': 'weight', 'shift': 'bias'}
    renamed = {}
    for name, tensor in tensors.items():
        if '.W_key' in name or '.W_value' in name or name.endswith('att.mask'):
            continue
        if '.W_query' in name:
            parts = [tensors[name.replace('query', part)] for part in ('query', 'key', 'value')]
            tensor = torch.cat(parts)
            name = name.replace('att.W_query', 'attn.c_attn')
        for theirs, ours in names.items():
            name = re.sub(rf'(^|\.){re.escape(theirs)}(?=\.|$)', rf'\1{ours}', name)
        renamed[name] = tensor
    return renamed


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
                    ours = name.removeprefix('transformer.')
                    tensors[ours] = transpose_conv1d(ours, opened.get_tensor(name))
        except SafetensorError as error:
            raise CorruptFile(file, error) from error
    beside = path.with_name('config.json')
    fields = read_json(beside) if beside.exists() else {}
    # what Hugging Face's GPT-2 may vary and this one does not
    fixed = {'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
             'scale_attn_by_inverse_layer_idx': False}
    for key, value in fixed.items():
        if fields.get(key, value) != value:
            raise ModelError(f'{beside}: {key} is {fields[key]!r}; this GPT-2 has {value!r}')
    return fields, tensors


# -----------------------------------------------------------------------------
# OpenAI's checkpoints, without TensorFlow: files of raw floats, and an index, which is a LevelDB table of
# protobuf messages (leveldb/doc/table_format.md, tensorflow/core/protobuf/tensor_bundle.proto)

INDEX_MAGIC = 0xDB4775248B80FB57  # the last eight bytes of an index


def masked_crc(data):
    """The checksum of OpenAI's files, a crc32c that is rotated and shifted as TensorFlow does it."""
    try:
        from google_crc32c import value
    except ImportError as error:
        raise ModelError("OpenAI's files need google-crc32c: pip install google-crc32c") from error
    crc = value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_varint(data, offset):
    """Seven bits a byte, low first, the eighth says that more follow -> (number, offset after it)."""
    number = 0
    shift = 0
    while data[offset] > 127:
        number |= (data[offset] & 127) << shift
        shift += 7
        offset += 1
    return number | data[offset] << shift, offset + 1


def parse_message(data):
    """A protobuf message -> {field: its values}, numbers for varints and fixed32, bytes for the rest."""
    fields = {}
    offset = 0
    while offset < len(data):
        tag, offset = read_varint(data, offset)
        wire_type = tag & 7
        if wire_type == 0:
            value, offset = read_varint(data, offset)
        elif wire_type == 2:
            size, offset = read_varint(data, offset)
            value = data[offset:offset + size]
            offset += size
        elif wire_type == 5:
            value = int.from_bytes(data[offset:offset + 4], 'little')
            offset += 4
        else:
            raise ValueError(f'it has a field of wire type {wire_type}')
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def read_block(data, handle):
    """A table and the handle of a block (varints offset, size): yields its (key, value) pairs. ValueError."""
    offset, after = read_varint(handle, 0)
    size, _ = read_varint(handle, after)
    end = offset + size
    compression = data[end]
    crc = int.from_bytes(data[end + 1:end + 5], 'little')
    if compression or masked_crc(data[offset:end + 1]) != crc:
        raise ValueError(f'the block at {offset} is compressed (type {compression}), or its checksum differs')
    # the block is its entries, then restart points and their number, which serve binary search
    block = data[offset:end]
    entries_end = size - 4 - 4 * int.from_bytes(block[-4:], 'little')
    key = b''
    i = 0
    while i < entries_end:
        # an entry: the bytes it shares with the key before it, the rest of its key, its value
        n_shared, i = read_varint(block, i)
        n_own, i = read_varint(block, i)
        n_value, i = read_varint(block, i)
        key = key[:n_shared] + block[i:i + n_own]
        i += n_own + n_value
        yield key, block[i - n_value:i]


def read_index(path):
    """({variable: its BundleEntryProto, field 2 as a list of dimensions}, the number of data files)."""
    with reading(path):
        data = path.read_bytes()
        if len(data) < 48 or data[-8:] != INDEX_MAGIC.to_bytes(8, 'little'):
            raise ValueError('it does not end as an index does')
        # the footer: offset and size of the metaindex, which is empty, then the handle of the index block
        _, offset = read_varint(data, len(data) - 48)
        _, offset = read_varint(data, offset)
        entries = {}
        for _, handle in read_block(data, data[offset:]):
            for key, value in read_block(data, handle):
                entries[key.decode()] = parse_message(value)
        header = entries.pop('', {})
        if 1 not in header or 2 in header:
            raise ValueError('it has no header, or a big-endian one')
        for name, entry in entries.items():
            if entry.get(1) != [1]:
                raise ValueError(f'{name} is of type {entry.get(1)}, not float32')
            dimensions = parse_message(entry[2][0]).get(2, []) if 2 in entry else []
            entry[2] = [parse_message(dimension).get(1, [0])[0] for dimension in dimensions]
    return entries, header[1][0]


def openai_name(variable):
    """model/h0/ln_1/g -> h.0.ln_1.weight."""
    *parts, last = re.sub(r'^h(\d)', r'h/\1', variable.removeprefix('model/')).split('/')
    ours = {'w': 'weight', 'g': 'weight', 'b': 'bias', 'wte': 'wte.weight', 'wpe': 'wpe.weight'}
    return '.'.join([*parts, ours.get(last, last)])


def read_openai(path):
    """OpenAI's model.ckpt.index: yields (name, tensor), GPT's names and shapes, verified, memory-mapped."""
    entries, n_files = read_index(path)
    for variable, entry in entries.items():
        shape = entry[2]
        number, offset, size, crc = [entry.get(field, [0])[0] for field in (3, 4, 5, 6)]
        file = path.with_name(f'{path.stem}.data-{number:05d}-of-{n_files:05d}')
        with reading(file):
            # mapped again for each tensor, so that the pages of finished ones do not stay in memory
            raw = np.memmap(file, np.uint8, 'c')[offset:offset + size]
            if not len(raw) == size == 4 * math.prod(shape):
                raise ValueError(f'{variable} {shape} has {size} bytes, of which {len(raw)} are there')
            if masked_crc(raw) != crc:
                raise ValueError(f'the checksum of {variable} differs')
        array = np.require(raw.view('<f4'), requirements='A')  # offsets need not be multiples of 4
        # layers are (1, in, out), as for convolutions of width 1
        array = array.reshape(shape[-2:] if shape[:1] == [1] else shape)
        name = openai_name(variable)
        yield name, transpose_conv1d(name, torch.from_numpy(array))


# -----------------------------------------------------------------------------
# the released weights, downloaded once

@dataclass
class Released:
    config: GPTConfig
    openai_folder: str
    data_bytes: int  # of model.ckpt.data-00000-of-00001
    index_bytes: int  # of model.ckpt.index
    safetensors_bytes: int = 0  # of Hugging Face's file; 0: not known
    safetensors_sha256: str = ''


RELEASED = {
    'gpt2': Released(
        GPTConfig(n_layer=12, n_head=12, n_embd=768), '124M', 497_759_232, 5_215, 548_105_171,
        '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
    'gpt2-medium': Released(
        GPTConfig(n_layer=24, n_head=16, n_embd=1024), '355M', 1_419_292_672, 10_399, 0,
        'fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd'),
    'gpt2-large': Released(GPTConfig(n_layer=36, n_head=20, n_embd=1280), '774M', 3_096_120_320, 15_535),
    'gpt2-xl': Released(GPTConfig(n_layer=48, n_head=25, n_embd=1600), '1558M', 6_230_444_800, 20_724),
}
OPENAI = ('https://openaipublic.blob.core.windows.net/gpt-2/models',
          'https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2')
HUGGING_FACE = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/') + '/openai-community'
RETRY_WAITS = 0, 1, 2, 4  # seconds before each try of an address
TIMEOUT = 10, 30  # seconds to connect, and without a byte


def fetch_openai(name, folder):
    """Download OpenAI's files of a name of RELEASED unless they are there; the path of the index."""
    released = RELEASED[name]
    sizes = {'hparams.json': 0, 'model.ckpt.data-00000-of-00001': released.data_bytes,
             'model.ckpt.index': released.index_bytes}
    for file, size in sizes.items():
        urls = [f'{base}/{released.openai_folder}/{file}' for base in OPENAI]
        path = download(urls, folder / file, size)
    return path


def fetch_huggingface(name, folder):
    """Download Hugging Face's file of a name of RELEASED unless it is there; its path."""
    released = RELEASED[name]
    url = f'{HUGGING_FACE}/{name}/resolve/main/model.safetensors'
    return download([url], folder / 'model.safetensors', released.safetensors_bytes,
                    released.safetensors_sha256)


def fetch_released(name, cache_dir='', download_from='openai'):
    """A name of RELEASED -> the path of its weights in the cache, downloaded if need be. ModelError."""
    default = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'gpt2-sft')
    folder = Path(cache_dir or default, name).expanduser()
    sources = {'openai': fetch_openai, 'huggingface': fetch_huggingface}
    if (folder / 'model.safetensors').exists() and not (folder / 'model.ckpt.index').exists():
        download_from = 'huggingface'  # an earlier start had to fall back to it
    # the preferred source first, then the other
    faults = []
    for source in sorted(sources, key=lambda source: source != download_from):
        try:
            return sources[source](name, folder)
        except ModelError as error:
            faults.append(str(error))
    raise ModelError(f'{name} cannot be downloaded ({faults[0][:90]}): without a network put its files into '
                     f'{folder}')


def file_fault(path, size, sha256):
    """What is wrong with a downloaded file, or ''. Some servers send a web page for what is not there."""
    if size and path.stat().st_size != size:
        return f'{path.stat().st_size:,} bytes instead of {size:,}'
    with open(path, 'rb') as file:
        if sha256 and hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
            return f'its sha256 differs from {sha256}'
        if not size and not sha256 and file.read(1) in (b'', b'<'):
            return 'a web page in it, or nothing'
    return ''


def download(urls, path, size=0, sha256=''):
    """
    Fetch path from the first of urls that gives it, unless it is there and right. It is written to path.part
    and renamed when whole; if size (bytes) or sha256 is given, a partial file is resumed. Time-outs, 5xx, 429
    and broken connections are retried with back-off, all else goes to the next address. Processes that write
    to one folder take turns. ModelError lists every address and its fault.
    """
    import requests
    from filelock import FileLock
    path = Path(path)
    faults = []
    try:
        # looked for before the lock too, since a cache may be read-only
        if path.exists() and not file_fault(path, size, sha256):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name('.lock')):
            if path.exists() and not file_fault(path, size, sha256):  # another process has just downloaded it
                return path
            for url in urls:
                # waiting helps against a busy server or a broken connection, not against a wrong address
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
    part = path.with_name(path.name + '.part')
    can_resume = (size or sha256) and part.exists()
    have = part.stat().st_size if can_resume else 0
    headers = {'Accept-Encoding': 'identity'}
    if have:
        headers['Range'] = f'bytes={have}-'
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        status = reply.status_code
        content_range = reply.headers.get('Content-Range', '')
        if status == 416 or status == 206 and not content_range.startswith(f'bytes {have}-'):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f'the partial file cannot be resumed ({status} {content_range})')
        if status not in (200, 206, 408, 429) and status < 500:
            raise ModelError(f'HTTP {status}')
        reply.raise_for_status()
        if status == 200:  # the server knows no ranges and sends the whole file
            have = 0
        total = have + int(reply.headers.get('Content-Length', size - have))
        if size and total != size:
            raise ModelError(f'{total:,} bytes instead of {size:,}')
        have = write_part(reply, part, have, total)
    if have < size:
        raise requests.ConnectionError(f'the connection broke after {have:,} of {size:,} bytes')
    fault = file_fault(part, size, sha256)
    if fault:
        part.unlink()
        raise ModelError(fault)
    os.replace(part, path)
    return path


def write_part(reply, part, have, total):
    """Append a reply to the part file, which has so many bytes of the total; how many it has in the end."""
    from tqdm import tqdm
    # a bar on a terminal; in a log a line for every tenth
    is_terminal = sys.stderr.isatty()
    bar = tqdm(desc=part.stem, total=total or None, initial=have, unit='B', unit_scale=True,
               disable=not is_terminal)
    with bar, open(part, 'ab' if have else 'wb') as file:
        for chunk in reply.iter_content(1 << 16):
            tenths_before = 10 * have // max(total, 1)
            file.write(chunk)
            have += len(chunk)
            bar.update(len(chunk))
            if not is_terminal and total and 10 * have // total > tenths_before:
                print(f'{part.stem}: {have:,} of {total:,} bytes', flush=True)
    return have
