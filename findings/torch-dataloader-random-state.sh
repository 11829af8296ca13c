#!/usr/bin/env bash
# torch 2.13.0, CPU.
# Seen: every iter() of a DataLoader draws a number from torch's global generator, with shuffle=False and
#   num_workers=0 too. An evaluation between two training steps thus changes the dropout masks and the samples
#   that follow it. generator=torch.Generator() in the loader leaves the global state alone.
# A good guess: a loader that does not shuffle and has no workers has nothing to draw.
# Why it matters: two runs that differ in eval_interval alone have different losses from the first evaluation
#   on, and a run resumed in the middle, restored to the bit with its random state, is equal to the straight one
#   only if it evaluates at the same steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.utils.data import DataLoader


def dropped(evaluation):
    """The dropout mask of a training step that follows the evaluation."""
    torch.manual_seed(0)
    for _ in evaluation:
        pass
    return torch.nn.functional.dropout(torch.ones(20), 0.5)


rows = list(range(8))
without = dropped([])
plain = torch.equal(dropped(DataLoader(rows, batch_size=4, shuffle=False, num_workers=0)), without)
own = torch.equal(dropped(DataLoader(rows, batch_size=4, generator=torch.Generator())), without)
print(f'the same dropout mask after an evaluation: {plain}; with a generator of its own: {own}')
assert not plain
assert own
PY
