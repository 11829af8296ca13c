#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.24.0 (torch 2.13.0, CPU).
# Seen: SFTConfig(packing=False, eval_packing=True) packs the evaluation rows and then lets them see each other:
#   at learning rate 0 the eval loss of three rows differs from the train loss of the same three (7.05 for 6.57
#   here). With packing=True for both, rows are kept apart and both losses are equal. Which collator is used,
#   the one that keeps rows apart or the ordinary one, is decided by `packing` alone.
# A good guess: eval_packing changes the speed of an evaluation, not its result.
# Why it matters: an evaluation is where one packs most readily, as nothing is learned there. The val loss then
#   is of another task, and early stopping and the choice of the best checkpoint go by it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 trl==1.16.0 datasets==5.2.0 \
    accelerate==1.15.0 tokenizers==0.23.3 numpy==2.4.6
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {letter: index for index, letter in enumerate(letters)} | {'<|endoftext|>': 256}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(['<|endoftext|>'])
rows = Dataset.from_list([
    {'prompt': 'Q: hi\n', 'completion': 'yo'},
    {'prompt': 'Q: what?\n', 'completion': 'it.'},
    {'prompt': 'Q: no?\n', 'completion': 'yes.'},
])


def losses(packing, eval_packing):
    """The train loss of the one step at learning rate 0, and the eval loss after it."""
    torch.manual_seed(0)
    no_dropout = {'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2, **no_dropout))
    for parameter in model.parameters():
        parameter.data.mul_(4)
    settings = SFTConfig(
        output_dir=os.environ['FOLDER'] + '/out', report_to=[], use_cpu=True, bf16=False, max_length=48,
        per_device_train_batch_size=3, per_device_eval_batch_size=3, max_steps=1, logging_steps=1, disable_tqdm=True,
        save_strategy='no', learning_rate=0.0, packing=packing, eval_packing=eval_packing)
    end = '<|endoftext|>'
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows,
                         processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end))
    trainer.train()
    return trainer.state.log_history[0]['loss'], trainer.evaluate()['eval_loss']


plain, both, evaluation = losses(False, False), losses(True, True), losses(False, True)
print(f'train and eval loss: packed nowhere {plain}, both {both}, the evaluation alone {evaluation}')
assert abs(plain[0] - plain[1]) < 1e-3
assert abs(both[0] - both[1]) < 1e-3 and abs(both[0] - plain[0]) < 1e-3
assert abs(evaluation[0] - plain[0]) < 1e-3
assert abs(evaluation[1] - plain[1]) > 0.1
PY
