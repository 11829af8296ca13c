"""
GPT-2 small (124M) on the 1,100 rows: the reference run for a machine with little memory or patience.

    python prepare.py config/sft_small.py
    python train.py   config/sft_small.py
    python sample.py  config/sft_small.py
    python judge.py   config/sft_small.py
"""
dataset = 'instruction-data'
out_dir = 'out/sft_small'

init_from = 'gpt2'

epochs = 2
learning_rate = 5e-5

max_new_tokens = 256
