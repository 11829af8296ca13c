#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, safetensors 0.8.0, CPU).
# Seen: config.json of a GPT-2 folder says tie_word_embeddings true, and model.safetensors holds both
#   transformer.wte.weight and another lm_head.weight. from_pretrained keeps the two apart: logits come from the
#   file's lm_head, and the model has two parameters, while model.config still says that they are tied. A
#   warning is logged; the loading info names nothing missing, unexpected or mismatched. Where the two are
#   equal, it ties them.
# A good guess: the configuration decides; lm_head.weight is unexpected and left out.
# Why it matters: a tie that was lost in training (see torch-to-empty-unties.sh) shows in no check of the
#   configuration or of the loading info; a file that is right to the last bit but for one changed embedding row
#   (say a new token) goes on untied, and tuning it further trains 39 M parameters more on Small.
#   `lm_head.weight is wte.weight` tells.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, logging

logging.disable_progress_bar()
torch.manual_seed(0)
folder = os.environ['FOLDER'] + '/model'
settings = GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
GPT2LMHeadModel(settings).save_pretrained(folder)
saved = load_file(folder + '/model.safetensors')
embedding = saved['transformer.wte.weight']
assert 'lm_head.weight' not in saved

tied = {}
for name, lm_head in {
    'equal': embedding.clone(),
    'one row changed': torch.cat([embedding[:99], embedding[99:] + 1]),
    'another': torch.randn(100, 32),
}.items():
    save_file(saved | {'lm_head.weight': lm_head}, folder + '/model.safetensors', metadata={'format': 'pt'})
    model, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    tied[name] = model.lm_head.weight is model.transformer.wte.weight
    from_file = torch.equal(model.lm_head.weight, lm_head)
    told = {key: values for key, values in info.items() if values}
    print(f"{name}: config ties {model.config.tie_word_embeddings}, tied {tied[name]}, lm_head is the file's {from_file}, "
          f'told {told}, parameters {sum(p.numel() for p in model.parameters())}')
    assert model.config.tie_word_embeddings
    assert from_file
    assert not told
assert tied == {'equal': True, 'one row changed': False, 'another': False}
PY
