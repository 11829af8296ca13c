#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU, attention 'sdpa').
# Seen: two rows in one sequence, told apart by position_ids that start at 0 again: GPT2LMHeadModel keeps them
#   apart with use_cache=False, and lets the second see the first with use_cache=True, which is the default, or
#   with an attention_mask of ones. The logits differ by far more than rounding and nothing is printed.
# A good guess: either position_ids never change the mask (they are mere positions), or they always do; and that
#   use_cache and a mask of ones change nothing but speed.
# Why it matters: training switches the cache off (Trainer with checkpointing, TRL), so it is right; a plain
#   forward on the same packed batch, in an evaluation of one's own or a test, sees across the rows and gives
#   another loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
for parameter in model.parameters():
    parameter.data.mul_(8)  # random weights are so small that attention hardly changes the logits

packed = torch.randint(0, 100, (1, 6))
positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
ones = torch.ones_like(packed)
differences = {}
with torch.no_grad():
    alone = model(packed[:, 3:]).logits
    for name, settings in {
        'use_cache=False': {'use_cache': False},
        'default': {},
        'use_cache=False, mask of ones': {'use_cache': False, 'attention_mask': ones},
    }.items():
        together = model(packed, position_ids=positions, **settings).logits[:, 3:]
        differences[name] = (together - alone).abs().max().item()
        print(f'{name:<30} the second row differs from itself alone by {differences[name]:.1e}')

assert differences['use_cache=False'] < 1e-3
assert differences['default'] > 1.0
assert differences['use_cache=False, mask of ones'] > 1.0
PY
