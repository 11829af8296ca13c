"""
LoRA (Hu et al. 2021), small trained matrices on a frozen model, and QLoRA (Dettmers et al. 2023), where the
frozen matrices are in 4 bits.

    add_lora(model, rank=16, alpha=16.0)                     # freezes the model; only A and B are trained
    add_lora(model, rank=16, alpha=16.0, quantize='nf4')     # and keeps its matrices in 4 bits
    save_adapter(model, 'adapter.safetensors', about)        # A and B alone, a few MB
    load_adapter(model, 'adapter.safetensors')               # onto a freshly loaded base
    merge_lora(model)                                        # W + alpha / rank * B A: a plain GPT again
    merged_state_dict(model)                                 # the same as a state dict; the model stays
"""
import json
import math
from dataclasses import replace
from pathlib import Path

from config import UserError, atomic_write, check_made_of
from model import MATRICES, GPTConfig, fingerprint

import torch
import torch.nn as nn
from torch.nn import functional as F

ALL_MATRICES = ','.join(MATRICES)


class LoRA(nn.Module):
    """y = base(x) + alpha / rank * B A dropout(x). The base is frozen; B is zero at first, so y = base(x)."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base = base
        self.drop = nn.Dropout(dropout)
        self.scale = alpha / rank
        # A begins as the weights of nn.Linear do, so that B has a gradient
        A = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        """x (..., in) -> (..., out). The scale multiplies B, which is smaller than the output."""
        z = F.linear(self.drop(x), self.A)  # (..., rank)
        B = self.B * self.scale
        return self.base(x) + F.linear(z, B)

    def merged_weight(self):
        """The one matrix (out, in), on the CPU, that computes the same without the dropout."""
        weight = gather(dequantize(self.base.weight))
        # in one operation, as W + scale * (B @ A) would hold three matrices at once
        return torch.addmm(weight, gather(self.B), gather(self.A), alpha=self.scale)


def add_lora(model, rank, alpha, dropout=0.0, targets=ALL_MATRICES, quantize='none'):
    """
    Freeze the model and give the matrices that `targets` names trainable A and B. quantize='nf4' keeps all
    matrices of the blocks in 4 bits. Raises UserError.
    """
    chosen = [target.strip() for target in targets.split(',')]
    if not set(chosen) <= set(MATRICES):
        raise UserError(f'lora_targets={targets!r} may name {", ".join(MATRICES)}')
    model.requires_grad_(False)
    for block in model.h:
        for matrix in MATRICES:
            layer = block.get_submodule(matrix)
            if quantize == 'nf4':
                layer = to_nf4(layer)
            if matrix in chosen:
                layer = LoRA(layer, rank, alpha, dropout)
            block.set_submodule(matrix, layer)
    # what an adapter tells of itself
    model.lora = {
        'rank': rank,
        'alpha': alpha,
        'targets': targets,
    }


def to_nf4(linear):
    """The layer with its matrix in 4 bits (NF4), the quantization constants quantized too."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    options = {'quant_type': 'nf4', 'compress_statistics': True}
    layer = Linear4bit(linear.in_features, linear.out_features, device='meta', **options)
    # it is quantized when it moves to its device
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, **options)
    layer.bias = linear.bias
    # on a CPU, eval() would pack the weights into a form that has no backward
    layer.support_avx512bf16_for_cpu = False
    return layer.to(linear.weight.device)


def dequantize(weight):
    """The matrix of a linear layer (out, in), unpacked if it is in 4 bits."""
    if hasattr(weight, 'quant_state'):
        from bitsandbytes.functional import dequantize_4bit
        return dequantize_4bit(weight, weight.quant_state)
    return weight


def gather(tensor):
    """The tensor on the CPU, whole: the shards of all processes put together."""
    if hasattr(tensor, 'full_tensor'):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


def merged_state_dict(model):
    """
    The state dict in GPT-2's names, fp32 on the CPU: LoRA merged, 4 bits unpacked, shards gathered, one
    matrix after the other. Under FSDP every process must call it.
    """
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            state[f'{name}.weight'] = module.merged_weight()
            state[f'{name}.bias'] = gather(module.base.bias)
        elif hasattr(module, 'weight') and not name.endswith('.base'):
            state[f'{name}.weight'] = gather(dequantize(module.weight))
            bias = getattr(module, 'bias', None)
            if bias is not None:
                state[f'{name}.bias'] = gather(bias)
    return state


def merge_lora(model):
    """Put a plain layer, its matrix merged, in the place of each one with LoRA."""
    for block in model.h:
        for matrix in MATRICES:
            layer = block.get_submodule(matrix)
            if isinstance(layer, LoRA):
                layer.base.weight.data = layer.merged_weight()
                block.set_submodule(matrix, layer.base)


def lora_parameters(model):
    """{name: parameter} of all A and B."""
    named = model.named_parameters()
    return {name: p for name, p in named if name.endswith(('.A', '.B'))}


def save_adapter(model, path, about, write=True):
    """Write A and B as safetensors, `about` in its metadata. Every process gathers, one writes."""
    from safetensors.torch import save
    state = {}
    for name, p in lora_parameters(model).items():
        state[name] = gather(p).contiguous()
    about = about | {'lora': model.lora}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    if write:
        atomic_write(path, lambda file: file.write(save(state, metadata)), 'wb')


def read_adapter(path):
    """A file of save_adapter -> (A and B by name, what it says of itself). UserError if it is not one."""
    from safetensors import safe_open
    if Path(path).is_dir():
        path = Path(path, 'adapter.safetensors')
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}
        about = {key: json.loads(value) for key, value in metadata.items()}
        # what load_adapter needs of it
        about['init_from'], about['lora']['rank']
        about['model'] = GPTConfig(**about['model'])
    except Exception as error:  # safetensors does not document which ones it raises
        raise UserError(f'{path} is not an adapter: {error}') from error
    return state, about


def load_adapter(model, path):
    """
    Put the adapter of save_adapter onto the model that it was made for; what it says of itself. UserError if
    that was another one, or if its matrices do not fit.
    """
    state, about = read_adapter(path)
    shape = replace(model.config, dropout=about['model'].dropout)
    if shape != about['model']:
        raise UserError(f'{path} fits {about["init_from"]} ({about["model"]}), not {shape}')
    # a base of the same shape that was trained otherwise would give answers of neither model
    base = {'base weights': fingerprint(model.state_dict())}
    check_made_of(path, about.get('made_of', {}), base, f'it fits {about["init_from"]} as that was then')
    add_lora(model, **about['lora'])
    # all names must fit: what is loaded in part answers like the base
    ours = {name: p.shape for name, p in lora_parameters(model).items()}
    theirs = {name: tensor.shape for name, tensor in state.items()}
    different = sorted({name for name, shape in ours.items() ^ theirs.items()})
    if different:
        raise UserError(f'{path} does not fit: {", ".join(different)[:160]}')
    model.load_state_dict(state, strict=False)
    return about
