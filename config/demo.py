"""
A small GPT from scratch learns seventeen families of tasks, on two cores.

    python data/make_demo.py              # only to write the rows again
    python prepare.py config/demo.py
    python train.py config/demo.py
    python sample.py config/demo.py
    python judge.py config/demo.py
"""
dataset = 'demo'
source = 'data/demo.json'
out_dir = 'out/demo'
init_from = 'scratch'
# five million weights, nearly all of them GPT-2's vocabulary; its output layer is most of the time too, so
# width is what costs, and layers are cheap
n_layer = 3
n_head = 4
n_embd = 96
block_size = 128
dropout = 0.0
# from scratch the first thing to learn is to copy the right word: many small steps, and a high rate
batch_size = 16
epochs = 9
learning_rate = 6e-3
schedule = 'cosine'
warmup_steps = 100
weight_decay = 0.1
grad_clip = 1.0
seed = 123
eval_interval = 600  # with eval_iters = 0 an evaluation reads all of train too
eval_iters = 0
max_new_tokens = 24
judge = 'reference'
