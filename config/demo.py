"""
A small GPT from scratch learns twenty families of tasks, on two cores: to rearrange the words of its prompt.

    python data/make_demo.py              # writes the rows
    python prepare.py config/demo.py
    python train.py config/demo.py
    python sample.py config/demo.py
    python judge.py config/demo.py
"""
dataset = 'demo'
source = 'data/demo.json'
split_seed = -1  # the file's own order: 46,000 rows of train, 900 of test, 300 of them with unseen words, 300
train_share = 0.97459
test_share = 0.01908
out_dir = 'out/demo'
init_from = 'scratch'
init = 'copying'
# seven million weights, nearly all of them GPT-2's vocabulary
n_layer = 3
n_head = 4
n_embd = 128
block_size = 128
dropout = 0.0
# four minutes on two slow cores, and a high rate
batch_size = 32
max_steps = 1900
learning_rate = 3e-3
schedule = 'cosine'
warmup_steps = 100
beta2 = 0.99
weight_decay = 0.0
grad_clip = 1.0
seed = 123
eval_interval = 1000
eval_iters = 5
max_new_tokens = 24
judge = 'reference'
