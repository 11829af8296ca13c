#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0, torch 2.13.0, CPU).
# Seen: add_weighted_adapter of two LoRA adapters, weights 0.5 and 0.5, combination_type='linear': the result's
#   change of the weights is nowhere near half of the one plus half of the other (relative error about 1 for two
#   independent adapters of equal rank). It sums the two factors, each times the root of its weight, and
#   multiplies then, so that each adapter's A meets the other's B. 'cat' is exact, at the sum of the ranks.
# A good guess: 'linear' is the weighted sum of the adapters' changes, as its name says.
# Why it matters: averaging the adapters of several epochs or data sets is done with just this call. The
#   combined adapter loads and answers; only a comparison with the sum shows that it is another model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 \
    numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
base = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=64, n_layer=1, n_head=2))
settings = LoraConfig(r=4, lora_alpha=8, target_modules=['c_attn'], fan_in_fan_out=True, task_type='CAUSAL_LM')
model = get_peft_model(base, settings, adapter_name='first')
model.add_adapter('second', settings)
for name, parameter in model.named_parameters():
    if 'lora_' in name:
        parameter.data.normal_(0, 0.1)
layer = model.base_model.model.transformer.h[0].attn.c_attn


def error(name, wanted):
    return ((layer.get_delta_weight(name) - wanted).norm() / wanted.norm()).item()


wanted = 0.5 * layer.get_delta_weight('first') + 0.5 * layer.get_delta_weight('second')
errors = {}
for kind in ('linear', 'cat'):
    model.add_weighted_adapter(['first', 'second'], [0.5, 0.5], kind, combination_type=kind)
    rank = layer.lora_A[kind].weight.shape[0]
    errors[kind] = error(kind, wanted)
    print(f'{kind}: rank {rank}, relative error against the average of the changes {errors[kind]:.1e}')
a = sum(0.5**0.5 * layer.lora_A[name].weight for name in ('first', 'second'))
b = sum(0.5**0.5 * layer.lora_B[name].weight for name in ('first', 'second'))
factors = error('linear', (b @ a).T * layer.scaling['first'])
print(f'linear against the product of the averaged factors {factors:.1e}')
assert errors['linear'] > 0.5
assert errors['cat'] < 1e-5
PY
