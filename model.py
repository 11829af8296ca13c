"""
GPT-2 in one file: the network, generation with a cache, and every way of loading one.

    model = GPT.from_pretrained('gpt2-medium')         # or a folder or file: OpenAI's, Hugging Face's, our own
    logits, _ = model(ids)                             # (B, T) -> (B, T, vocab)
    answers = model.generate([prompt_ids], 256)        # list of id lists -> list of new ids

B rows, T positions, C = n_embd channels, H heads of C/H channels.
"""
import json
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from config import UserError
from files import write_aside

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
        sizes = {(12, 768): 'gpt2-small124M', (24, 1024): 'gpt2-medium355M',
                 (36, 1280): 'gpt2-large774M', (48, 1600): 'gpt2-xl1558M'}
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
        x, targets, weight = self.ln_f(x[keep]), targets[keep], self.wte.weight
        if torch.is_autocast_enabled(x.device.type):  # autocast knows nothing of the chunked form
            x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
        if each:
            return None, F.linear_cross_entropy(x, weight, targets, reduction='none').float()
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK) if len(targets) > CHUNK else None
        loss = F.linear_cross_entropy(x, weight, targets, reduction='sum', options=options).float()
        return None, loss / (denominator or len(targets))


# --- LoRA: Hu et al. 2021


class LoRA(nn.Module):
    """y = base(x) + alpha / rank * B A dropout(x). The base is frozen; B starts at zero, so at first y = base(x)."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.drop = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(self.drop(x), self.A), self.B * self.scale)

    def merged(self):
        """The one matrix (out, in) that does the same."""
        return dense(self.base.weight) + self.B @ self.A * self.scale


MATRICES = 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'


def add_lora(model, rank, alpha, dropout=0.0, targets=','.join(MATRICES), quantize='none'):
    """Freeze the model and give the matrices that `targets` names trainable A and B. 'nf4' keeps all matrices in 4 bits."""
    chosen = [target.strip() for target in targets.split(',')]
    if not set(chosen) <= set(MATRICES):
        raise UserError(f'lora_targets={targets!r} may name {", ".join(MATRICES)}')
    if quantize not in ('none', 'nf4'):
        raise UserError(f"quantize={quantize!r} is none of 'none', 'nf4'")
    model.requires_grad_(False)
    for block in model.h:
        for matrix in MATRICES:
            layer = block.get_submodule(matrix)
            layer = to_nf4(layer) if quantize == 'nf4' else layer
            layer = LoRA(layer, rank, alpha, dropout) if matrix in chosen else layer
            block.set_submodule(matrix, layer)
    model.lora = {'rank': rank, 'alpha': alpha, 'targets': targets}


def to_nf4(linear):
    """-> the layer with its matrix in 4 bits (NF4, constants quantised again: Dettmers et al. 2023); packed by .to(device)."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise UserError("quantize='nf4' needs a package: pip install bitsandbytes==0.50.2") from error
    layer = Linear4bit(linear.in_features, linear.out_features, quant_type='nf4', compress_statistics=True, device='meta')
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type='nf4', compress_statistics=True)
    layer.bias = linear.bias
    return layer.to(linear.weight.device)


def dense(weight):
    """-> the matrix of a linear layer (out, in), unpacked if it is in 4 bits."""
    if hasattr(weight, 'quant_state'):
        from bitsandbytes.functional import dequantize_4bit
        return dequantize_4bit(weight, weight.quant_state)
    return weight


def plain_state(model):
    """The state dict in GPT-2's names, fp32 on the CPU: LoRA merged, 4 bits unpacked, shards gathered (on every process)."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            state |= {f'{name}.weight': module.merged(), f'{name}.bias': module.base.bias}
        elif hasattr(module, 'weight') and not name.endswith('.base'):
            state[f'{name}.weight'] = dense(module.weight)
            if getattr(module, 'bias', None) is not None:
                state[f'{name}.bias'] = module.bias
    return {name: (p.full_tensor() if hasattr(p, 'full_tensor') else p).detach().cpu() for name, p in state.items()}


def save_adapter(model, path, origin):
    """A and B alone, as safetensors, with what they fit in the metadata."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError('adapter.safetensors needs a package: pip install safetensors') from error
    state = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items() if name[-2:] in ('.A', '.B')}
    about = {'lora': json.dumps(model.lora), 'model': json.dumps(asdict(model.config)), 'origin': json.dumps(origin)}
    write_aside(path, lambda file: file.write(save(state, about)), 'wb')


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
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16'), rank, world
