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
import io
import json
import logging
import math
import os
import re
import zipfile
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
    """Each head mixes the values of the positions it attends to; c_proj mixes the heads."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f'{config.n_head} heads in a width of {config.n_embd}'
        self.n_head = config.n_head
        self.dropout = config.dropout
        # queries, keys and values of all heads in one product
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
        # the heads side by side again
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two layers on each position alone, the one between them four times as wide."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # OpenAI's GELU is the tanh approximation; the exact one moves logits by 4e-4
        x = F.gelu(self.c_fc(x), approximate='tanh')
        return self.c_proj(x)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream x, each after a norm of its own (pre-norm)."""

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
    """The token embedding, whose matrix is the output layer's, too (tied weights). There is no lm_head."""

    def unembed(self, x):
        """x (..., C) -> (..., vocab)."""
        return F.linear(x, self.weight)


@dataclass
class GPTConfig:
    """The shape of GPT-2 Small by default. OpenAI's four models have heads of 64 channels."""
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


MATRICES = 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'  # of a block


class GPT(nn.Module):
    """The whole network, in GPT-2's parameter names."""

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
        return self.wte.unembed(self.ln_f(x))

    def token_losses(self, x, targets):
        """
        Hidden states (N, C) and targets (N,) -> the cross-entropy of each (N,), in nats, at least in fp32:
        minus the logarithm of the probability that the model gives to the target.
        """
        if len(targets) > LOGITS_CHUNK:
            # 8 rows of 1,024 targets would have logits of 1.6 GB. Backward computes those of a chunk again
            chunks = zip(x.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK))
            return torch.cat([checkpoint(self.token_losses, *chunk, use_reentrant=False) for chunk in chunks])
        logits = self.logits(x)
        # under autocast they are in half precision, of which a sum of exponentials would lose too much
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction='none')

    def forward(self, ids, targets=None, positions=None, segments=None, loss_reduction='mean'):
        """
        ids (B, T) -> logits (B, T, vocab). With targets (B, T): the cross-entropy of those that are not
        IGNORE, in nats, as their 'mean' or 'sum', or with 'none' each of them (N,), row by row.

        positions (B, T): by default 0 to T - 1. segments (B, T): of packed rows, see packed_attention.
        """
        attention = causal_attention if segments is None else packed_attention(segments)
        x = self.hidden_states(ids, positions, attention)
        if targets is None:
            return self.logits(x)
        # prompts and pads have no loss, so their logits are never made
        has_loss = targets != IGNORE
        losses = self.token_losses(x[has_loss], targets[has_loss])
        if loss_reduction == 'none':
            return losses
        return losses.mean() if loss_reduction == 'mean' else losses.sum()

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=0.0, top_k=0, seed=0, eos=50256):
        """
        A prompt's ids (a list) -> the list of new ids, up to an end-of-text, which is left out. Call
        model.eval() first where the model has dropout. This is the definition: engine.generate gives the same
        ids, of many prompts at once, with a cache.
        """
        rng = random_numbers(ids, seed)
        new_ids = []
        # without a cache, every new id costs a forward pass over all those before it
        while len(new_ids) < max_new_tokens and len(ids) + len(new_ids) < self.config.block_size:
            logits = self(torch.tensor([ids + new_ids], device=self.wte.weight.device))[0, -1]
            next_id = sample_token(logits, temperature, top_k, rng)
            if next_id == eos:
                break
            new_ids.append(next_id)
        return new_ids

    @classmethod
    def from_pretrained(cls, where, cache_dir='', download_from='openai', dropout=0.0, mapped=False,
                        vocab_size=math.inf):
        """
        where: a name of RELEASED, or the path of a file or folder: OpenAI's, Hugging Face's, nanoGPT's,
        chapter 7's or our own. Returns a GPT in fp32 on the CPU, in training mode.

        cache_dir: where a name's files are kept (empty: gpt2-sft in the user's cache); download_from: whose
        are tried first. mapped: leave the weights in the file, read-only. vocab_size: leave out the ids from
        this one on, which some models have beyond their tokenizer's. ModelError names what is at fault.
        """
        is_released = where in RELEASED
        path = fetch_released(where, cache_dir, download_from) if is_released else find_checkpoint(where)
        try:
            config, tensors = read_checkpoint(path)
            config = replace(config, dropout=dropout, vocab_size=min(config.vocab_size, vocab_size))
            tensors['wte.weight'] = tensors['wte.weight'][:config.vocab_size]
            # one at a time: the mapped pages of a tensor are freed before the next one is copied
            for name in tensors:
                tensor = tensors[name].float()
                tensors[name] = tensor if mapped else tensor.clone(memory_format=torch.contiguous_format)
            with reading(path, f'it does not fit a GPT-2 of {config.n_layer} layers, width {config.n_embd}'):
                # no memory and no random numbers for weights whose places the tensors take
                with torch.device('meta'):
                    model = cls(config)
                model.load_state_dict(tensors, assign=True)
        except CorruptFile as error:
            if not is_released:
                raise
            error.path.unlink(missing_ok=True)
            raise ModelError(f'{error}; it is removed: start again to download it') from error
        print(f'loaded {path} as {model.config.name}')
        return model


# -----------------------------------------------------------------------------
# what generate and engine.py share, and what tells models apart

def random_numbers(ids, seed):
    """The random numbers of one answer. They depend on its prompt and the seed alone."""
    return np.random.default_rng([seed % 2**32, *ids])


def sample_token(logits, temperature, top_k, rng):
    """logits (vocab,) -> an id: the likeliest at temperature 0, else drawn, from top_k likeliest or all."""
    if temperature < 1e-6:  # fp32 could not divide by it
        return logits.argmax().item()
    logits = logits.float() / temperature
    if top_k:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    # the first id at which the cumulative probability reaches a random number above 0 and up to 1
    cumulative = logits.softmax(dim=0).cumsum(dim=0)
    return torch.searchsorted(cumulative, cumulative[-1] * (1 - rng.random())).item()


def fingerprint(tensors):
    """
    {name: tensor} -> 64 hex digits that tell these weights from others: the sha256 of names, shapes and at
    most 8,191 values of each tensor. Any training changes it; 1.5 billion weights take a tenth of a second.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {list(tensor.shape)}'.encode())
        values = tensor.detach().flatten()
        # odd, or the samples would fall into the same few columns of each row: LoRA may change a single one
        step = max(1, len(values) // 4096) | 1
        digest.update(values[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# checkpoints: which file, and what is in it

class ModelError(Exception):
    """What the user can mend. config/__init__.py prints an error that has an exit_code in one line."""
    exit_code = 2


class CorruptFile(ModelError):
    """A file whose content is wrong: a checksum, a format or a shape says so."""

    def __init__(self, path, reason):
        super().__init__(f'cannot read {path}: {reason}')
        self.path = path


@contextlib.contextmanager
def reading(path, fault=''):
    """Errors while path is read: the system's become ModelError, those of the content CorruptFile."""
    try:
        yield
    except (ModelError, ImportError):  # these prove nothing against the file
        raise
    except OSError as error:
        raise ModelError(f'cannot read {path}: {error.strerror or error}') from error
    except Exception as error:  # torch and safetensors do not document which ones they raise
        reason = ' '.join(str(error).split()) or type(error).__name__
        reason = reason.partition('. ')[0][:300]
        raise CorruptFile(path, f'{fault} ({reason})' if fault else reason) from error


def find_checkpoint(where):
    """A path -> its file; of a folder the newest of our models, else a checkpoint, OpenAI's, safetensors."""
    path = Path(where).expanduser()
    if path.is_file():
        return path
    # a run's best model is its *-sft.pth, even if its ckpt.pt is newer
    for pattern in '*-sft.pth', 'ckpt.pt', '*.index', '*.safetensors.index.json', '*.safetensors':
        found = [file for file in path.glob(pattern) if file.is_file()]
        if found:
            return max(found, key=os.path.getmtime)
    raise ModelError(f'{where} is not a checkpoint, nor a folder with *-sft.pth, ckpt.pt, model.ckpt.index '
                     f'or *.safetensors; a model is one of {", ".join(RELEASED)}, or the path to one')


def read_checkpoint(path):
    """
    A file -> (its GPTConfig, {name: tensor} in GPT's names and shapes). The shape is told by the file itself,
    by the .json beside it, or by the tensors. Raises ModelError.
    """
    fields = {}
    if path.suffix == '.index':
        tensors = read_openai(path)
        beside = path.with_name('hparams.json')
    elif '.safetensors' in path.name:
        tensors = read_safetensors(path)
        beside = path.with_name('config.json')
    elif path.suffix in ('.pt', '.pth'):
        fields, tensors = read_torch(path)
        beside = path.with_suffix('.json')
    else:
        raise ModelError(f'{path} is not a *.pth, *.pt, *.index or *.safetensors')
    with reading(path, 'it does not hold the weights of a GPT-2'):
        tensors = convert_tensors(tensors)
        if not fields and not beside.exists():
            return guess_config(tensors, path, beside), tensors
    if fields:
        return make_config(fields, path), tensors
    fields = read_json(beside)
    # the .json of a run tells more than the shape of its model
    return make_config(fields.get('model', fields), beside), tensors


def read_json(path):
    """A file of a JSON object -> dict. Raises ModelError."""
    with reading(path):
        return dict(json.loads(path.read_text(encoding='utf-8')))


def make_config(fields, path):
    """Fields in our, OpenAI's or Hugging Face's names, which were read from path -> GPTConfig."""
    ours = {'n_ctx': 'block_size', 'n_positions': 'block_size', 'n_vocab': 'vocab_size'}
    names = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'
    with reading(path, 'it does not tell the shape of a GPT-2'):
        fields = {ours.get(key, key): value for key, value in fields.items()}
        config = GPTConfig(*[int(fields[name]) for name in names])
    # what Hugging Face's GPT-2 may vary and this one does not
    fixed = {
        'activation_function': 'gelu_new',
        'layer_norm_epsilon': 1e-5,
        'scale_attn_weights': True,
        'scale_attn_by_inverse_layer_idx': False,
    }
    for key, value in fixed.items():
        if fields.get(key, value) != value:
            raise ModelError(f'{path}: {key} is {fields[key]!r}; this GPT-2 has {value!r}')
    return config


def guess_config(tensors, path, beside):
    """The shapes of tensors tell all but the number of heads, which is known for OpenAI's widths."""
    vocab_size, n_embd = tensors['wte.weight'].shape
    n_heads = {768: 12, 1024: 16, 1280: 20, 1600: 25}
    if n_embd not in n_heads:
        raise ModelError(f'{path}: a width of {n_embd} has no usual number of heads: write n_layer, n_head, '
                         f'n_embd, n_positions and vocab_size into {beside}')
    layers = {name.split('.')[1] for name in tensors if name.startswith('h.')}
    return GPTConfig(len(tensors['wpe.weight']), vocab_size, len(layers), n_heads[n_embd], n_embd)


def transpose_conv1d(name, tensor):
    """OpenAI and Hugging Face store layers (in, out) -> (out, in). The square c_proj does not show it."""
    is_layer = '.c_' in name and name.endswith('weight') and tensor.dim() == 2
    return tensor.t() if is_layer else tensor


# patterns of others' names, which are replaced one after the other
OUR_NAMES = {
    # prefixes: of torch.compile, of DistributedDataParallel, of Lightning and OpenAI, and of Hugging Face and
    # nanoGPT, in this order
    '^((_orig_mod|module|model|transformer)[./])+': '',
    # OpenAI: h0/ln_1/g is h.0.ln_1.weight, and wte is wte.weight
    '/': '.',
    '^h([0-9])': r'h.\1',
    '[.][gw]$': '.weight',
    '[.]b$': '.bias',
    '^(wte|wpe)$': r'\1.weight',
    # "Build a Large Language Model (From Scratch)": trf_blocks.0.ff.layers.2.bias is h.0.mlp.c_proj.bias
    'tok_emb': 'wte',
    'pos_emb': 'wpe',
    'final_norm': 'ln_f',
    'out_head': 'lm_head',
    'trf_blocks': 'h',
    'norm1': 'ln_1',
    'norm2': 'ln_2',
    'att.W_query': 'attn.c_attn',
    'att.out_proj': 'attn.c_proj',
    'ff.layers.0': 'mlp.c_fc',
    'ff.layers.2': 'mlp.c_proj',
    'scale$': 'weight',
    'shift$': 'bias',
}
# masks of attention are not weights; keys and values are joined with their queries
LEFT_OUT = r'\.(attn\.bias|attn\.masked_bias|att\.mask|att\.W_key\..*|att\.W_value\..*)$'


def convert_tensors(tensors):
    """
    {name: tensor} of any kind of file -> the same in GPT's names and shapes. ValueError or KeyError if it
    cannot be that of a GPT-2.
    """
    ours = {}
    for name, tensor in tensors.items():
        if 'W_query' in name:
            # queries, keys and values are three matrices there, and one here
            parts = [tensors[name.replace('query', part)] for part in ('query', 'key', 'value')]
            tensor = torch.cat(parts)
        for theirs, replacement in OUR_NAMES.items():
            name = re.sub(theirs, replacement, name)
        if torch.is_tensor(tensor) and tensor.is_floating_point() and not re.search(LEFT_OUT, name):
            ours[name] = tensor
    # some files hold the tied output layer, too, or instead of wte
    head = ours.pop('lm_head.weight', None)
    if head is not None and not torch.equal(head, ours.setdefault('wte.weight', head)):
        raise ValueError('its output layer differs from its token embedding, and here they are one tensor')
    if 'wte.weight' not in ours:
        raise ValueError('no wte.weight; where a run trained LoRA, load the *-sft.pth beside this file')
    # c_attn, which is not square, tells how layers are stored
    n_rows, n_columns = ours['h.0.attn.c_attn.weight'].shape
    if n_rows < n_columns:
        ours = {name: transpose_conv1d(name, tensor) for name, tensor in ours.items()}
    # nanoGPT trains without biases by default, and the book's chapter 5 without those of queries, keys and
    # values: which is the same as biases of zero. A bias that other blocks have is missing by a fault
    kinds = {re.sub('[0-9]+', '', name) for name in ours}
    for name in list(ours):
        bias = name.replace('weight', 'bias')
        if name.startswith(('h.', 'ln_f.')) and re.sub('[0-9]+', '', bias) not in kinds:
            ours[bias] = torch.zeros(len(ours[name]))
    return ours


def read_torch(path):
    """
    A run's ckpt.pt, nanoGPT's, or a state dict alone -> (its shape or {}, {name: tensor}). Code in it is not
    run (weights_only), and the tensors stay in the file (mmap), unless it is older than torch 1.6.
    """
    with reading(path, 'it is damaged, or holds Python objects instead of a state dict'):
        is_mappable = zipfile.is_zipfile(path)
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=is_mappable)
        fields = saved.get('model_config') or saved.get('model_args') or {}
        # the state dict may lie beside an optimizer's, under one of these names
        for key in 'model', 'model_state_dict', 'state_dict':
            saved = saved.get(key, saved)
    return fields, saved


def read_safetensors(path):
    """One file, or the index of several -> {name: tensor}."""
    from safetensors.torch import load_file
    files = {path}
    if path.suffix == '.json':
        with reading(path, 'its weight_map does not tell the file of each tensor'):
            names = read_json(path)['weight_map'].values()
            files = {path.with_name(name) for name in names}
    tensors = {}
    for file in files:
        with reading(file):
            tensors |= load_file(file)
    return tensors


# -----------------------------------------------------------------------------
# OpenAI's checkpoints, without TensorFlow: files of raw floats, and an index that tells where in them a
# variable is. The index is a LevelDB table (leveldb/doc/table_format.md):
#
#     block, block, ... | empty block | block of the handles of the blocks | handles of the last two
#
# A handle is an offset and a size. The blocks have pairs: the name of a variable, and a protobuf message on
# it (tensorflow/core/protobuf/tensor_bundle.proto)


def masked_crc(data):
    """The checksum of OpenAI's files, a crc32c that is rotated and shifted as TensorFlow does it."""
    from google_crc32c import value
    crc = value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_varint(stream):
    """The next number: seven bits a byte, low ones first, the eighth says that more follow. AC 02 is 300."""
    number = 0
    shift = 0
    while True:
        byte = stream.read(1)[0]
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number


def parse_message(data):
    """Yield (field, value) of a protobuf message: numbers of varints and fixed32, bytes of all else."""
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        tag = read_varint(stream)
        wire_type = tag & 7
        if wire_type == 0:
            value = read_varint(stream)
        elif wire_type == 5:
            value = int.from_bytes(stream.read(4), 'little')
        else:  # 2: TensorFlow has no others here
            value = stream.read(read_varint(stream))
        yield tag >> 3, value


def read_block(data, handle):
    """Yield (key, value) of a block of a table. handle: a stream that tells where it is. ValueError."""
    offset = read_varint(handle)
    end = offset + read_varint(handle)
    # behind the block: a byte that says how it is compressed, and the checksum of both
    crc = int.from_bytes(data[end + 1:end + 5], 'little')
    if data[end] != 0 or masked_crc(data[offset:end + 1]) != crc:
        raise ValueError(f'the block at {offset} is compressed, or its checksum differs')
    # at its end: restart points, which serve binary search, and their number
    n_restarts = int.from_bytes(data[end - 4:end], 'little')
    entries = data[offset:end - 4 - 4 * n_restarts]
    stream = io.BytesIO(entries)
    key = b''
    while stream.tell() < len(entries):
        # an entry: how many bytes its key shares with the one before, and the rest of it; its value
        n_shared = read_varint(stream)
        n_own = read_varint(stream)
        n_value = read_varint(stream)
        key = key[:n_shared] + stream.read(n_own)
        yield key, stream.read(n_value)


def read_index(path):
    """({variable: its BundleEntryProto as {field: value}}, the number of data files)."""
    entries = {}
    with reading(path, 'it is not the index of a checkpoint'):
        data = path.read_bytes()
        footer = io.BytesIO(data[-48:])
        # the handle of the empty block
        read_varint(footer)
        read_varint(footer)
        for _, handle in read_block(data, footer):
            for key, message in read_block(data, io.BytesIO(handle)):
                entries[key.decode()] = dict(parse_message(message))
        # the first entry has no name, and tells of all files
        return entries, entries.pop('')[1]


def read_openai(path):
    """OpenAI's model.ckpt.index -> {variable: tensor}, verified and memory-mapped."""
    entries, n_files = read_index(path)
    tensors = {}
    for variable, entry in entries.items():
        # a BundleEntryProto: 1 dtype, 2 shape, 3 file, 4 offset, 5 size, 6 checksum; zeros are left out
        shape = [dict(parse_message(size)).get(1, 0) for _, size in parse_message(entry[2])]
        if shape[0] == 1:  # layers are (1, in, out), as for convolutions of width 1
            shape = shape[1:]
        file = path.with_name(f'{path.stem}.data-{entry.get(3, 0):05d}-of-{n_files:05d}')
        with reading(file):
            # each has a mapping of its own, which is freed with it
            raw = np.memmap(file, np.uint8, 'c', entry.get(4, 0), entry.get(5, 0))
            if entry[1] != 1 or masked_crc(raw) != entry[6]:
                raise ValueError(f'{variable} is not of float32, or its checksum differs')
            array = raw.view('<f4').reshape(shape)
            tensors[variable] = torch.from_numpy(array)
    return tensors


# -----------------------------------------------------------------------------
# the released weights, downloaded once

# OpenAI's name of each, and the bytes of its model.ckpt.data-00000-of-00001
RELEASED = {
    'gpt2': ('124M', 497_759_232),
    'gpt2-medium': ('355M', 1_419_292_672),
    'gpt2-large': ('774M', 3_096_120_320),
    'gpt2-xl': ('1558M', 6_230_444_800),
}
# the sha256 of Hugging Face's files, where it is known
HUGGING_FACE_SHA256 = {
    'gpt2': '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707',
    'gpt2-medium': 'fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd',
}
OPENAI_URLS = ('https://openaipublic.blob.core.windows.net/gpt-2/models',
               'https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2')
HUGGING_FACE_URL = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/') + '/openai-community'
TIMEOUT = 10, 30  # seconds to connect, and without a byte


def fetch_openai(name, folder):
    """Download OpenAI's files of a name of RELEASED unless they are there; the path of the index."""
    size_name, n_bytes = RELEASED[name]
    # the index comes last, so that where it is the numbers are, too
    sizes = {'model.ckpt.data-00000-of-00001': n_bytes, 'model.ckpt.index': 0}
    for file, size in sizes.items():
        urls = [f'{base}/{size_name}/{file}' for base in OPENAI_URLS]
        path = download(urls, folder / file, size)
    return path


def fetch_huggingface(name, folder):
    """Download Hugging Face's file of a name of RELEASED unless it is there; its path."""
    url = f'{HUGGING_FACE_URL}/{name}/resolve/main/model.safetensors'
    return download([url], folder / 'model.safetensors', sha256=HUGGING_FACE_SHA256.get(name, ''))


def fetch_released(name, cache_dir='', download_from='openai'):
    """A name of RELEASED -> the path of its weights in the cache, downloaded if need be. ModelError."""
    default = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'gpt2-sft')
    folder = Path(cache_dir or default, name).expanduser()
    # the preferred source first, unless an earlier start had to fall back to the other
    has_fallen_back = (folder / 'model.safetensors').exists() and not (folder / 'model.ckpt.index').exists()
    sources = [fetch_openai, fetch_huggingface]
    if download_from == 'huggingface' or has_fallen_back:
        sources.reverse()
    faults = []
    for fetch_from in sources:
        try:
            return fetch_from(name, folder)
        except ModelError as error:
            faults.append(str(error))
    raise ModelError(f'without a network put the files of {name} into {folder}; {faults[0]}')


def download(urls, path, size=0, sha256=''):
    """
    Fetch path from the first of urls that gives it, unless it is there. It is written to path.part, checked
    where its size (bytes) or sha256 is known, and renamed. Where one of them is known, what an earlier start
    left of it is resumed. Processes that write to one folder take turns. ModelError lists what was tried.
    """
    from filelock import FileLock
    path = Path(path)
    try:
        # a cache may be read-only, so it is not locked unless something is missing
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name('.lock')):
                # another process may have downloaded it in the meantime
                if not path.exists():
                    fetch_first(urls, path, size, sha256)
    except OSError as error:
        raise ModelError(f'cannot write {path}: {error.strerror or error}') from error
    return path


def fetch_first(urls, path, size, sha256):
    """Fetch path from the first of urls that gives it. ModelError."""
    import requests
    from urllib3 import Retry
    logging.getLogger('urllib3').setLevel(logging.ERROR)  # no line for every attempt
    # a server that is busy or away is asked again at once, after two seconds and after four
    retry = Retry(3, backoff_factor=1, status_forcelist=[429, 500, 502, 503, 504],
                  respect_retry_after_header=False)
    adapter = requests.adapters.HTTPAdapter(max_retries=retry)
    session = requests.Session()
    session.mount('http://', adapter)
    session.mount('https://', adapter)
    part = path.with_name(path.name + '.part')
    if not size and not sha256:
        part.unlink(missing_ok=True)  # nothing would tell whether the rest belongs to it
    faults = {}
    wrong = set()  # addresses that sent another file
    # Retry does not resume a body that breaks off: the next address, or the same one again, goes on with part
    for url in urls * 3:
        if url in wrong:
            continue
        try:
            fetch(session, url, part)
            check_or_remove(part, size, sha256)
            os.replace(part, path)
            return
        except requests.RequestException as error:
            # urllib3's MaxRetryError, inside requests' own error, has the fault of the last attempt
            faults[url] = getattr(error.args[0], 'reason', error)
        except ModelError as error:
            faults[url] = error
            wrong.add(url)
    tried = '; '.join(f'{url}: {fault}' for url, fault in faults.items())
    raise ModelError(f'cannot download {path.name}: {tried}')


def check_or_remove(part, size, sha256):
    """ModelError if a downloaded part is not the right file. It is removed: going on would not mend it."""
    n_bytes = part.stat().st_size
    with open(part, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    if size not in (0, n_bytes) or sha256 not in ('', digest):
        part.unlink()
        raise ModelError(f'another {part.stem} was sent, of {n_bytes:,} bytes and the sha256 {digest}')


def fetch(session, url, part):
    """
    Append to the part what it lacks of the file at url, or replace it by the whole file, if the server sends
    that. Raises ModelError or requests' exceptions.
    """
    from tqdm import tqdm
    have = part.stat().st_size if part.exists() else 0
    # not compressed on the way, so that bytes can be counted
    headers = {'Accept-Encoding': 'identity', 'Range': f'bytes={have}-'}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        if reply.status_code == 416:  # the part is as long as the file, but was not right
            part.unlink(missing_ok=True)
        reply.raise_for_status()
        if 'text/html' in reply.headers.get('Content-Type', ''):
            raise ModelError('it is a web page')
        if not reply.headers.get('Content-Range', '').startswith(f'bytes {have}-'):
            have = 0
        print(f'downloading {url}', flush=True)
        total = have + int(reply.headers.get('Content-Length', 0))
        bar = tqdm(desc=part.stem, total=total, initial=have, unit='B', unit_scale=True, disable=None)
        with bar, open(part, 'ab' if have else 'wb') as file:
            for chunk in reply.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
