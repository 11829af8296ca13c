#!/usr/bin/env bash
# torch 2.13.0, CPU.
# Seen: load_state_dict(..., assign=True) makes two parameters of a tied pair, even where both names of the file
#   stand on one memory, as torch.load gives them back. The result says "All keys matched successfully". Both
#   parameters then lie on that one memory, each with a gradient of its own, and an optimizer moves the same
#   numbers twice a step: AdamW with lr 0.1 moves wte by 0.2 in its first step. With assign=False it moves by
#   0.1.
# A good guess: one tensor in the file means one parameter in the model; at worst a copy each.
# Why it matters: assign=True is what one uses to load into a meta model without a second copy. data_ptr() is
#   equal afterwards, so the usual check of a tie passes; `is` and the number of parameters show it. Tie again
#   after loading.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os

import torch
from torch import nn


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(5, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        return self.lm_head(self.wte(ids))


torch.manual_seed(0)
path = os.environ['FOLDER'] + '/model.pt'
torch.save(TiedModel().state_dict(), path)

for assign in (False, True):
    model = TiedModel()
    print('assign', assign, model.load_state_dict(torch.load(path), assign=assign))
    one_memory = model.wte.weight.data_ptr() == model.lm_head.weight.data_ptr()
    one_parameter = model.wte.weight is model.lm_head.weight
    before = model.wte.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    nn.functional.cross_entropy(model(torch.arange(5)), torch.arange(5)).backward()
    optimizer.step()
    largest = (model.wte.weight - before).abs().max().item()
    print(f'  one memory {one_memory}, one parameter {one_parameter}, largest move of wte {largest:.3f}')
    assert one_memory
    assert one_parameter is not assign
    assert abs(largest - (0.2 if assign else 0.1)) < 1e-3
PY
