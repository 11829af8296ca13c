"""
After `make demo`: its model learns a family of tasks that was held back from it, with LoRA or all weights.

    python prepare.py config/demo_lora.py
    python train.py   config/demo_lora.py
    python sample.py  config/demo_lora.py
    python judge.py   config/demo_lora.py

    python train.py   config/demo_lora.py --lora_rank=0 --learning_rate=1e-3 --out_dir=out/demo_full
    python sample.py  config/demo_lora.py --out_dir=out/demo_full
    python judge.py   config/demo_lora.py --out_dir=out/demo_full
"""
dataset = 'demo_heldback'
source = 'data/demo_heldback.json'
out_dir = 'out/demo_lora'
train_share = 0.6  # of 300 rows; the more are tested, the narrower the intervals
test_share = 0.35

init_from = 'out/demo'
lora_rank = 16
lora_alpha = 32.0
block_size = 128

epochs = 24
batch_size = 16
learning_rate = 5e-3
schedule = 'cosine'
warmup_steps = 10
grad_clip = 1.0

eval_interval = 48
eval_iters = 0

max_new_tokens = 24
judge = 'reference'
