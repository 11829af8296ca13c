#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU).
# Seen: pipeline('text-generation') of a folder whose generation_config.json says nothing of lengths makes up to
#   256 new tokens; generate() of the same model makes 20. With "max_length": 40 in that file both make 40 less
#   the prompt, with "max_new_tokens": 30 both make 30.
# A good guess: the pipeline calls generate(), so both have one default; and a default of 256 new tokens given
#   by the pipeline would be stronger than a max_length out of a file.
# Why it matters: a model card's figures from generate() and a user's from the pipeline differ in answers cut
#   after 20 tokens. A folder whose answers should be as long anywhere says max_new_tokens in
#   generation_config.json itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, logging, pipeline

logging.set_verbosity_error()
logging.disable_progress_bar()
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {letter: index for index, letter in enumerate(letters)} | {'<|endoftext|>': 256}
tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokens.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token='<|endoftext|>')

torch.manual_seed(0)
settings = GPT2Config(vocab_size=257, n_positions=512, n_embd=32, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256)
model = GPT2LMHeadModel(settings).eval()
path = os.environ['FOLDER'] + '/model'


def new_tokens(**lengths):
    """How many tokens the pipeline and generate() make of a prompt of 3 tokens, with these lengths in the file."""
    # eos_token_id None: nothing but the length ends an answer
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=256, **lengths)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    generator = pipeline('text-generation', model=path, tokenizer=path, device='cpu')
    by_pipeline = len(generator('abc', return_tensors=True)[0]['generated_token_ids']) - 3
    loaded = GPT2LMHeadModel.from_pretrained(path)
    loaded.generation_config.eos_token_id = None
    by_generate = loaded.generate(**tokenizer('abc', return_tensors='pt')).shape[1] - 3
    print(f'{lengths or "no lengths"}: pipeline {by_pipeline}, generate {by_generate}')
    return by_pipeline, by_generate


assert new_tokens() == (256, 20)
assert new_tokens(max_length=40) == (37, 37)
assert new_tokens(max_new_tokens=30) == (30, 30)
PY
