"""
The reference run: GPT-2 Medium (355M) on the 1,100 rows of chapter 7, "Build a Large Language Model From
Scratch".

    python prepare.py config/sft_medium.py
    python train.py   config/sft_medium.py
    python sample.py  config/sft_medium.py
    python judge.py   config/sft_medium.py
"""
dataset = 'instruction-data'
source = (
    'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/'
    'ch07/01_main-chapter-code/instruction-data.json'
)
out_dir = 'out/sft_medium'

init_from = 'gpt2-medium'
block_size = 1024
dropout = 0.0

epochs = 1
batch_size = 8
learning_rate = 5e-5
weight_decay = 0.1
schedule = 'constant'
seed = 123

eval_interval = 5
eval_iters = 5

max_new_tokens = 256
judge = 'ollama'
judge_model = 'llama3'
