"""
A small GPT learns sixteen families of tasks on two cores: to rearrange the words of its prompt.

    make demo                             # or, one by one:
    python data/make_demo.py              # writes the rows and the model to start from
    python prepare.py config/demo.py
    python train.py config/demo.py
    python sample.py config/demo.py
    python judge.py config/demo.py
"""
dataset = 'demo'
source = 'data/demo.json'
split_seed = -1  # the file's own order: 80,000 rows of train, 900 of test (300 with unseen words), 300 of val
train_share = 0.985222
test_share = 0.011084
out_dir = 'out/demo'

# nine million weights, nearly all of them GPT-2's vocabulary
init_from = 'data/demo_start.pth'
block_size = 128
sampled_softmax = 1024

# minutes on two cores, and a high rate
batch_size = 32
max_steps = 2700
learning_rate = 2e-3
schedule = 'cosine'
warmup_steps = 100
beta2 = 0.99
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 1000
eval_iters = 5
sample_every_epoch = False

max_new_tokens = 40
judge = 'reference'
