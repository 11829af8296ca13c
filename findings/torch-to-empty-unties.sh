#!/usr/bin/env bash
# torch 2.13.0, CPU.
# Seen: a GPT-2 made on the meta device has wte.weight and lm_head.weight as one parameter. After
#   Module.to_empty() they are two parameters with two memories; Module.to() on an ordinary model keeps them
#   one. Nothing is printed.
# A good guess: to_empty() keeps the tie, as to() does. Both go through the same private method.
# Why it matters: building on meta and filling with to_empty() is the usual way to load a large model without a
#   first random copy. The model then trains an output layer of its own (39 M parameters more on GPT-2 Small),
#   is a third larger on disk, and no longer is GPT-2. Tie the weights again after to_empty().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.lm_head = nn.Linear(8, 50, bias=False)
        self.lm_head.weight = self.wte.weight


def describe(name, model):
    tied = model.wte.weight is model.lm_head.weight
    count = sum(p.numel() for p in model.parameters())
    print(f'{name:<12} tied {tied}, parameters {count}')
    return tied, count


with torch.device('meta'):
    model = TiedModel()
assert describe('on meta', model) == (True, 400)
model.to_empty(device='cpu')
assert describe('to_empty()', model) == (False, 800)
model.lm_head.weight = model.wte.weight
assert describe('tied again', model) == (True, 400)
assert describe('to(float64)', TiedModel().to(torch.float64)) == (True, 400)
PY
