#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU).
# Seen: Trainer's train loss is the same for batches of 1, 2 and 8 rows with accumulation to 8 (it divides by
#   the targets of the whole step), to 1e-6. Its eval_loss of the same rows is another for 1 and 2 than for 8,
#   by 0.018 here: the mean over batches of the means over targets, so a target in a short answer weighs more.
# A good guess: since the counting of targets over the step was mended in training, evaluation counts them too.
# Why it matters: eval_loss decides about early stopping and the best checkpoint, and cannot be compared between
#   two machines with another per_device_eval_batch_size. With batches of one row it is the mean over rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.manual_seed(0)
no_dropout = {'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2, **no_dropout))
for parameter in model.parameters():
    parameter.data.mul_(4)

# six rows with one target, two rows with eleven; no row's first label is a target
rows = []
for index in range(8):
    ids = torch.randint(0, 257, (12,))
    labels = ids.clone()
    labels[:11 if index < 6 else 1] = -100
    rows.append({'input_ids': ids, 'labels': labels})
true = model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss.item()
print(f'mean over all targets {true:.4f}')

trained, evaluated = {}, {}
for size in (1, 2, 8):
    settings = TrainingArguments(
        output_dir=os.environ['FOLDER'], report_to=[], use_cpu=True, per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size, per_device_eval_batch_size=size, learning_rate=0.0, max_steps=1,
        logging_steps=1, disable_tqdm=True, save_strategy='no')
    trainer = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trained[size] = trainer.state.log_history[0]['loss']
    evaluated[size] = trainer.evaluate()['eval_loss']
    print(f'batches of {size}: train loss {trained[size]:.4f}, eval loss {evaluated[size]:.4f}')
assert all(abs(loss - true) < 1e-4 for loss in trained.values())
assert abs(evaluated[8] - true) < 1e-4
assert abs(evaluated[1] - true) > 0.01
PY
