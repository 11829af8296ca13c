#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU).
# Seen: Trainer divides GPT-2's loss by the number of labels that are not -100, the first label of each row
#   included, though nothing predicts it. On rows of 4 tokens, all of them labels, it logs 3/4 of the true loss,
#   in training and in evaluation alike, and the gradients are 3/4 of the true ones. LlamaForCausalLM on the
#   same rows is right: Trainer leaves the first label out where the model says loss_type 'ForCausalLM', which
#   it takes from the name of the class; GPT2LMHeadModel has None.
# A good guess: both are the mean over the targets, as model(...).loss is.
# Why it matters: a loss, a perplexity or a gradient norm of such a run cannot be compared with another code
#   base's. Short rows that train on the prompt, too, are off by several per cent; response-only labels are
#   right, as their first is -100.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os

import torch
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments)

torch.manual_seed(0)
no_dropout = {'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2, **no_dropout))
llama = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=64))
rows = [{'input_ids': torch.arange(4) + i, 'labels': torch.arange(4) + i} for i in range(8)]
batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

shares = {}
for model in (gpt2, llama):
    settings = TrainingArguments(
        output_dir=os.environ['FOLDER'], report_to=[], use_cpu=True, per_device_train_batch_size=8,
        per_device_eval_batch_size=8, learning_rate=0.0, max_steps=1, logging_steps=1, disable_tqdm=True,
        save_strategy='no')
    true = model(**batch).loss.item()
    trainer = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trained = trainer.state.log_history[0]['loss']
    evaluated = trainer.evaluate()['eval_loss']
    name = type(model).__name__
    print(f'{name}: loss_type {model.loss_type}, mean over targets {true:.4f}, train {trained:.4f}, eval {evaluated:.4f}')
    shares[name] = (trained / true, evaluated / true)

assert all(abs(share - 0.75) < 1e-3 for share in shares['GPT2LMHeadModel'])
assert all(abs(share - 1.0) < 1e-3 for share in shares['LlamaForCausalLM'])
PY
