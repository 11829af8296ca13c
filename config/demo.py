"""
The demo: a small GPT learns the tasks of data/demo.json from scratch, in minutes on two cores. `make demo` runs

    python prepare.py config/demo.py
    python train.py   config/demo.py
    python sample.py  config/demo.py
    python judge.py   config/demo.py
"""
dataset = 'demo'
source = 'data/demo.json'
out_dir = 'out/demo'

init_from = 'scratch'
n_layer = 3
n_head = 4
n_embd = 96
block_size = 128

epochs = 9
batch_size = 16
learning_rate = 6e-3
schedule = 'cosine'
warmup_steps = 50
grad_clip = 1.0

eval_interval = 200
eval_iters = 0

max_new_tokens = 64
judge = 'reference'
