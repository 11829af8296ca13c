#!/usr/bin/env bash
# torch 2.13.0, CPU.
# Seen: a query that may attend to nothing gets zeros from F.scaled_dot_product_attention, with a bool mask and
#   with -inf, in the math and the flash kernel alike, and finite gradients. A float mask with the least finite
#   number (torch.finfo(dtype).min) gives the plain mean over all values, the future and other rows included;
#   masks of -inf in a softmax written out give nan. nn.MultiheadAttention in training gives nan with
#   need_weights=True (the default) and none with need_weights=False.
# A good guess: nan everywhere but with finfo.min, which is used to avoid it and harms nobody.
# Why it matters: "no nan" proves nothing about padding. A left-padded or packed row with a hole in its mask is
#   silently zero here and silently a mean over its neighbours there, so the same fault gives different losses
#   in two code bases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
x = torch.randn(1, 1, 4, 8, requires_grad=True)
allowed = torch.ones(4, 4, dtype=torch.bool).tril()
allowed[1] = False  # the second query sees nothing
infinite = torch.zeros(4, 4).masked_fill(~allowed, float('-inf'))
finite = torch.zeros(4, 4).masked_fill(~allowed, torch.finfo(torch.float32).min)

for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
    for name, mask in (('bool', allowed), ('-inf', infinite), ('finfo.min', finite)):
        with sdpa_kernel(kernel):
            out = scaled_dot_product_attention(x, x, x, attn_mask=mask)
        gradient = torch.autograd.grad(out.sum(), x)[0]
        zeros = bool((out[0, 0, 1] == 0).all())
        mean = torch.allclose(out[0, 0, 1], x[0, 0].mean(0), atol=1e-6)
        print(f'{kernel.name}, {name}: zeros {zeros}, mean of all four {mean}, gradient finite {gradient.isfinite().all()}')
        assert zeros == (name != 'finfo.min')
        assert mean == (name == 'finfo.min')
        assert gradient.isfinite().all()

written_out = ((x @ x.mT) / 8**0.5 + infinite).softmax(-1) @ x
print('softmax written out:', written_out[0, 0, 1, :2].tolist())
assert written_out[0, 0, 1].isnan().all()
attention = nn.MultiheadAttention(8, 1, batch_first=True)
for need_weights in (True, False):
    out = attention(x[0], x[0], x[0], attn_mask=~allowed, need_weights=need_weights)[0]
    print(f'MultiheadAttention, need_weights {need_weights}: nan {out[0, 1].isnan().all()}')
    assert out[0, 1].isnan().all() == need_weights
PY
