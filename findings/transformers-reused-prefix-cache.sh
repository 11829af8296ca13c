#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU).
# Seen: a DynamicCache filled with a common prefix is handed to generate() for one prompt after another. The
#   first answer is right. generate() leaves prompt and answer in the cache, and the second call does not
#   notice: it answers another text than without a cache, with no error and no warning of it.
#   copy.deepcopy(cache) for each call is right every time.
# A good guess: the cache comes back as it went in, or a cache that does not fit the prompt is refused.
# Why it matters: all prompts of an instruction template share their first tokens (24 of about 38 on the rows of
#   chapter 7), so a shared prefix is the first speed-up that one tries, and a check on one prompt passes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import copy

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
for parameter in model.parameters():
    parameter.data.mul_(8)
settings = {'max_new_tokens': 6, 'do_sample': False, 'pad_token_id': 0, 'eos_token_id': None}

prefix = torch.randint(0, 100, (1, 6))
cache = DynamicCache(config=model.config)
with torch.no_grad():
    model(prefix, past_key_values=cache)
untouched = copy.deepcopy(cache)

shared, copied, lengths = [], [], []
for _ in range(2):
    prompt = torch.cat([prefix, torch.randint(0, 100, (1, 10))], dim=1)
    settings['attention_mask'] = torch.ones_like(prompt)
    right = model.generate(prompt, **settings)
    of_copy = model.generate(prompt, past_key_values=copy.deepcopy(untouched), **settings)
    of_shared = model.generate(prompt, past_key_values=cache, **settings)
    copied.append(torch.equal(of_copy, right))
    shared.append(torch.equal(of_shared, right))
    lengths.append(cache.get_seq_length())

print(f'equal to no cache: copied cache {copied}, shared cache {shared}; positions in the shared cache {lengths}')
assert copied == [True, True]
assert shared == [True, False]
assert lengths[0] == 21 and lengths[1] > 21
PY
