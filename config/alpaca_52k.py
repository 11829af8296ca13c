"""
GPT-2 Medium on Stanford's 52,002 Alpaca rows: 128 rows a step, warm-up and cosine. For a GPU, or several:

    python prepare.py config/alpaca_52k.py
    torchrun --nproc_per_node=4 train.py config/alpaca_52k.py --gradient_accumulation_steps=4
    python train.py   config/alpaca_52k.py
    python sample.py  config/alpaca_52k.py
    python judge.py   config/alpaca_52k.py --judge=reference
"""
dataset = 'alpaca'
source = 'https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json'
out_dir = 'out/alpaca_52k'
train_share = 0.98
test_share = 0.01

init_from = 'gpt2-medium'
block_size = 1024

epochs = 3
batch_size = 8
gradient_accumulation_steps = 16
learning_rate = 2e-5
schedule = 'cosine'
warmup_steps = 36  # 3 % of an epoch's steps, three times
min_lr = 2e-6
grad_clip = 1.0

eval_interval = 50
eval_iters = 20
save_interval = 200
keep_best = True

max_new_tokens = 256
