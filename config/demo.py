"""
A small GPT from scratch learns twenty families of tasks, on two cores: to rearrange the words of its prompt.

    python data/make_demo.py              # only to write the rows again
    python prepare.py config/demo.py
    python train.py config/demo.py
    python sample.py config/demo.py
    python judge.py config/demo.py
"""
dataset = 'demo'
source = 'data/demo.json'
split_seed = -1  # the file's own order: 10,500 rows of train, 900 of test, 300 of them with unseen words, 300
train_share = 0.8975
test_share = 0.077
out_dir = 'out/demo'
init_from = 'scratch'
init = 'copying'
# seven million weights, nearly all of them GPT-2's vocabulary; its output layer is most of the time too, so
# width is what costs, and layers are cheap
n_layer = 3
n_head = 4
n_embd = 128
block_size = 128
dropout = 0.0
# many small steps, and a high rate
batch_size = 16
epochs = 4
learning_rate = 3e-3
schedule = 'cosine'
warmup_steps = 100
beta2 = 0.99
weight_decay = 0.0
grad_clip = 1.0
seed = 123
eval_interval = 500
eval_iters = 20
max_new_tokens = 24
judge = 'reference'
