#!/usr/bin/env bash
# torch 2.13.0, CPU.
# Seen: AdamW.load_state_dict(other.state_dict()) takes the other optimizer's tensors as they are: both moments
#   and the step counter are shared, so a step of one changes the other, with every implementation (fused,
#   foreach, plain). And it takes every setting of the group, `fused`, lr and weight_decay too: an optimizer
#   made with fused=True is not fused afterwards if the file's was not.
# A good guess: load_state_dict copies, as Module.load_state_dict does, and what the constructor was given as an
#   implementation stays.
# Why it matters: two runs branched off one state in one process (an A/B of learning rates, a rollback after a
#   diverged step) corrupt each other in silence: the second one's bias correction counts the first one's steps.
#   A checkpoint on disk is safe. And a resume with another learning_rate in the config goes on with the old
#   one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch


def make(**settings):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return weight, torch.optim.AdamW([weight], **settings)


for settings in ({'fused': True}, {'foreach': True}, {'foreach': False}):
    weight, source = make(lr=0.1, **settings)
    source.step()
    state = source.state[weight]
    moment = state['exp_avg'].clone()
    other_weight, branch = make(lr=0.1, **settings)
    branch.load_state_dict(source.state_dict())
    branch.step()
    changed = not torch.equal(moment, state['exp_avg'])
    print(f'{settings}: the source made 1 step, its counter says {state["step"].item():.0f}, moments changed {changed}')
    assert state['step'] == 2
    assert changed

_, plain = make(lr=0.1)
_, fused = make(lr=0.01, weight_decay=0.5, fused=True)
fused.load_state_dict(plain.state_dict())
group = fused.param_groups[0]
print({name: group[name] for name in ('lr', 'weight_decay', 'fused')})
assert group['fused'] is None
assert (group['lr'], group['weight_decay']) == (0.1, 0.01)
PY
