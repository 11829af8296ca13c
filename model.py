"""
GPT-2 in one file: the network, generation with a cache, and every way of loading one.

    model = GPT.from_pretrained('gpt2-medium')         # or a folder or file: OpenAI's, Hugging Face's, our own
    logits, _ = model(ids)                             # (B, T) -> (B, T, vocab)
    answers = model.generate([prompt_ids], 256)        # list of id lists -> list of new ids

B rows, T positions, C = n_embd channels, H heads of C/H channels.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

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
