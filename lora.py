"""
Variations of a GPT that the base run does without: LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023),
small trained matrices on a frozen model; answers from matrices in float16; and a start for a small model that
is to copy and rearrange words.

    add_lora(model, rank=16, alpha=16.0)                     # freezes the model; only A and B are trained
    add_lora(model, rank=16, alpha=16.0, quantize='nf4')     # and keeps its matrices in 4 bits
    save_adapter(model, 'adapter.safetensors', about)        # A and B alone, a few MB
    load_adapter(model, 'adapter.safetensors')               # onto a freshly loaded base
    merged_state_dict(model)                                 # W + B A, in GPT-2's names

    place, autocast = for_inference(device, dtype)           # how sample.py and serve.py compute answers
    init_for_copying(model)                                  # instead of GPT-2's initialization
"""
import json
import math
from dataclasses import asdict

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from config import UserError, atomic_write, write_json, write_safetensors
from prepare import EOS, get_tokenizer

MATRICES = 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'
ALL_MATRICES = ','.join(MATRICES)

class LoRA(nn.Module):
    """y = base(x) + alpha / rank * B A dropout(x). The base is frozen; B is zero at first, so y = base(x)."""

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

    def merged_weight(self):
        """-> the one matrix (out, in) that computes the same, without the dropout."""
        return dequantize(self.base.weight) + self.B @ self.A * self.scale

def add_lora(model, rank, alpha, dropout=0.0, targets=ALL_MATRICES, quantize='none'):
    """
    Freeze the model and give the matrices that `targets` names trainable A and B. quantize='nf4' keeps all
    matrices of the blocks in 4 bits. Raises UserError.
    """
    chosen = [target.strip() for target in targets.split(',')]
    if not set(chosen) <= set(MATRICES):
        raise UserError(f'lora_targets={targets!r} may name {", ".join(MATRICES)}')
    if quantize not in ('none', 'nf4'):
        raise UserError(f"quantize={quantize!r} is none of 'none', 'nf4'")
    model.requires_grad_(False)
    for block in model.h:
        for matrix in MATRICES:
            layer = block.get_submodule(matrix)
            if quantize == 'nf4':
                layer = to_nf4(layer)
            if matrix in chosen:
                layer = LoRA(layer, rank, alpha, dropout)
            block.set_submodule(matrix, layer)
    model.lora = {'rank': rank, 'alpha': alpha, 'targets': targets}

def to_nf4(linear):
    """-> the layer with its matrix in 4 bits (NF4), the quantization constants quantized too."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise UserError("quantize='nf4' needs a package: pip install bitsandbytes==0.50.2") from error
    options = {'quant_type': 'nf4', 'compress_statistics': True}
    layer = Linear4bit(linear.in_features, linear.out_features, device='meta', **options)
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, **options)
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = False  # the form into which eval() packs the weights has no backward
    return layer.to(linear.weight.device)

def dequantize(weight):
    """-> the matrix of a linear layer (out, in), unpacked if it is in 4 bits."""
    if hasattr(weight, 'quant_state'):
        from bitsandbytes.functional import dequantize_4bit
        return dequantize_4bit(weight, weight.quant_state)
    return weight

def gather(tensor):
    """-> the tensor on the CPU, whole: the shards of all processes put together."""
    return (tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor).detach().cpu()

def merged_state_dict(model):
    """
    -> the state dict in GPT-2's names, fp32 on the CPU: LoRA merged, 4 bits unpacked, shards gathered. Under
    FSDP every process must call it.
    """
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            state[f'{name}.weight'], state[f'{name}.bias'] = module.merged_weight(), module.base.bias
        elif hasattr(module, 'weight') and not name.endswith('.base'):
            state[f'{name}.weight'] = dequantize(module.weight)
            if getattr(module, 'bias', None) is not None:
                state[f'{name}.bias'] = module.bias
    return {name: gather(tensor) for name, tensor in state.items()}

def save_adapter(model, path, about, write=True):
    """Write A and B as safetensors, what they fit in its metadata. Every process gathers, one writes."""
    from safetensors.torch import save
    adapters = [(name, p) for name, p in model.named_parameters() if name.endswith(('.A', '.B'))]
    state = {name: gather(p).contiguous() for name, p in adapters}
    metadata = {key: json.dumps(value) for key, value in (about | {'lora': model.lora}).items()}
    if write:
        atomic_write(path, lambda file: file.write(save(state, metadata)), 'wb')

def load_adapter(model, path):
    """Put the adapter of save_adapter onto the model it was made for. UserError if it fits another one."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, 'pt') as file:
            metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        about = {key: json.loads(metadata[key]) for key in ('lora', 'model', 'init_from')}
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UserError(f'{path} is not an adapter: {error}') from error
    shape = asdict(model.config) | {'dropout': about['model']['dropout']}
    if shape != about['model']:
        raise UserError(f'{path} fits {about["init_from"]} ({about["model"]}), not {shape}')
    add_lora(model, **about['lora'])
    model.load_state_dict(state, strict=False)

def save_peft(model, folder, base):
    """Write the adapter as the package peft reads it, for transformers' model `base`, a name or folder."""
    state = {f'base_model.model.transformer.{name[:-2]}.lora_{name[-1]}.weight': gather(p)
             for name, p in model.named_parameters() if name.endswith(('.A', '.B'))}
    write_safetensors(folder / 'adapter_model.safetensors', state)
    write_json(folder / 'adapter_config.json', {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base,
        'r': model.lora['rank'], 'lora_alpha': model.lora['alpha'], 'lora_dropout': 0.0, 'bias': 'none',
        'inference_mode': True, 'target_modules': model.lora['targets'].replace(' ', '').split(','),
        'fan_in_fan_out': True})  # transformers holds GPT-2's matrices (in, out)

# --- answers in less than fp32

class Float16Linear(nn.Module):
    """A layer for inference on a CPU: its matrix is kept in float16, states and sums are fp32 (FBGEMM)."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach(), bias)

    def forward(self, x):  # (..., in) -> (..., out)
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)

def keep_in_float16(model):
    """Keep all matrices in float16, whose rounding is all that changes: a step that reads them reads half."""
    for block in model.h:
        for matrix in MATRICES:
            layer = block.get_submodule(matrix)
            is_lora = isinstance(layer, LoRA)
            weight, bias = (layer.merged_weight(), layer.base.bias) if is_lora else (layer.weight, layer.bias)
            block.set_submodule(matrix, Float16Linear(weight, bias.detach()))
    model.output_layer = Float16Linear(model.wte.weight).forward
    model.wte.weight.data = model.wte.weight.data.half()  # the sum with wpe's vectors is fp32

def for_inference(device, dtype):
    """
    -> (place, autocast): place(model) moves it to the device for inference, and it answers in the context
    autocast. On a CPU float16 is that of the matrices alone, where FBGEMM has such products (x86 with AVX2).
    """
    has_products = ('fbgemm' in torch.backends.quantized.supported_engines
                    and hasattr(torch.ops.quantized, 'linear_prepack_fp16'))
    is_of_matrices = device.type == 'cpu' and dtype == torch.float16 and has_products

    def place(model):
        model.to(device).eval()
        if is_of_matrices:
            keep_in_float16(model)
        return model
    return place, torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not is_of_matrices)

# --- a start from scratch for copying words

N_SAMPLED = 1024  # tokens that training does not meet, in the output layer of a step
ENDINGS = 'ing', 'ies', 'ied', 'est', 'er', 'es', 'ed', 'ly', 's', 'd', 'y', 'e'
ALIKE = {'ies': 's', 'es': 's', 'ied': 'ed', 'd': 'ed'}  # endings of the same meaning

def parts_of(token):
    """A token's text -> (stem, ending, whether a space comes first, whether a capital does)."""
    word = token.strip(' ')
    if not (word.isascii() and word.isalpha()):
        return token, '', False, False
    stem = word.lower()
    ending = next((end for end in ENDINGS if stem.endswith(end) and len(stem) - len(end) >= 3), '')
    stem = stem.removesuffix(ending)
    if ending in ('ing', 'ed', 'er', 'est') and len(stem) > 3 and stem[-1] == stem[-2] not in 'lsz':
        stem = stem[:-1]  # stopped: stop
    return stem, ALIKE.get(ending, ending), token[0] == ' ', word[0].isupper()

@torch.no_grad()
def init_for_copying(model):
    """
    Instead of GPT-2's initialization, for a small model that is to rearrange the words of its prompt: what a
    head needs for it is there from the start, and a short training only sharpens it.

    Channels: 2 heads' width for a token, one for its position, one for the token before. Token vectors are
    sums of random codes, for stem, ending, space, capital and the token itself, so that `kicked` and ` kick`
    differ by what all such pairs differ by. For induction (Olsson et al. 2022) a head of the first layer
    reads the token before, and two of the second look for where that is the present token. All other heads
    hand on what they read (after Trockman and Kolter 2023). Raises UserError.
    """
    C, H = model.config.n_embd, model.config.n_head
    if H != 4 or model.config.n_layer < 2 or model.config.vocab_size <= EOS:
        raise UserError("init='copying' needs n_head=4, n_layer=2 or more, and GPT-2's vocabulary")
    d, size = C // H, 0.1 * math.sqrt(2)

    # tokens: sums of codes, in the proportions of `shares`, scaled to std `size`
    shares = torch.tensor([1.0, 0.5, 0.35, 0.35, 0.6])
    shares = size * shares / shares.norm()
    texts = [get_tokenizer().decode_single_token_bytes(id).decode(errors='replace') for id in range(EOS)]
    number, wte = {}, model.wte.weight.zero_()  # number: of each part, in the order in which they are met
    parts = [[number.setdefault(part, len(number)) for part in (*enumerate(parts_of(text)), ('token', id))]
             for id, text in enumerate([*texts, '<end>'])]
    codes = torch.randn(len(number), 2 * d)
    for share, its_parts in zip(shares, torch.tensor(parts).T):
        wte[:EOS + 1, :2 * d] += share * codes[its_parts]

    # positions: pairs of a sine and a cosine, most frequencies at random, so that no two places are alike
    frequency = torch.cat((torch.rand(d // 2 - 4) * math.pi, torch.tensor([0.03, 0.07, 0.15, 0.3])))
    angle = torch.arange(model.config.block_size)[:, None] * frequency
    pairs = torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)
    model.wpe.weight.zero_()[:, 2 * d:3 * d] = size * math.sqrt(2) * pairs

    # the C channels are four blocks of d: two halves of a token, its position, the token before. Each head
    # reads one half of a token and writes it there again
    q, k, v = 0, 1, 2
    position, before = 2, 3
    one = torch.eye(d)
    reads = [block.attn.c_attn.weight.view(3, H, d, 4, d) for block in model.h]  # q, k, v; head; from a block
    writes = [block.attn.c_proj.weight.normal_(std=0.02).view(4, d, H, d) for block in model.h]  # to a block
    for read, write in zip(reads, writes):
        for head in range(H):
            read[v, head, :, head % 2] += one
            write[head % 2, :, head] += one

    # first layer, first head: the query is turned by a step, so that it meets the key of the place before
    turn = torch.block_diag(*(torch.tensor([[f.cos(), -f.sin()], [f.sin(), f.cos()]]) for f in frequency))
    read, write = reads[0][:, 0], writes[0][:, :, 0]
    read.zero_()
    write.zero_()
    read[q, :, position], read[k, :, position], read[v, :, 0], write[before] = 1.4 * turn, 1.4 * one, one, one

    # second layer, first two heads: the present token is looked for among those before
    read = reads[1][:, :2]
    read[[q, k]] = 0
    read[q, :, :, 0] = read[k, :, :, before] = 1.4 * one

def train_met_tokens(model, ids, shard=False):
    """
    Let training change the vectors of the tokens in ids alone. The others, which are never right, would drift
    together and become alike, so that a word that training never met could not be copied.

    A step of training chooses among the tokens in ids and N_SAMPLED others, drawn anew (sampled softmax, Jean
    et al. 2015): all 50,257 in the output layer took half of its time. Evaluation has all of them.
    """
    if shard:
        raise UserError("init='copying' goes with one process or several, not with shard=True")
    wte, is_met = model.wte.weight, torch.zeros(model.config.vocab_size, dtype=torch.bool)
    is_met[np.unique(ids).tolist()] = True
    met, others = (chosen.nonzero()[:, 0].to(wte.device) for chosen in (is_met, ~is_met))
    place_in_met = (is_met.cumsum(0) - 1).to(wte.device)
    losses_over_all = model.target_losses

    def sampled_losses(x, targets):  # (N, C), (N,) -> (N,), as GPT.target_losses
        if not model.training:
            return losses_over_all(x, targets)
        drawn = others[torch.randint(len(others), (N_SAMPLED,), device=wte.device)]
        logits = F.linear(x, torch.cat((F.embedding(met, wte), wte.detach()[drawn])))
        logits[:, len(met):] += math.log(len(others) / N_SAMPLED)  # each stands for so many
        return F.cross_entropy(logits.float(), place_in_met[targets], reduction='none')

    model.target_losses = sampled_losses
