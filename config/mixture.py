"""
GPT-2 Medium on three sets of rows, 68,000 in all, in two conventions; the report tells its figures by source.

    python prepare.py config/mixture.py
    python train.py   config/mixture.py
    python sample.py  config/mixture.py
    python judge.py   config/mixture.py --judge=reference
"""
dataset = 'mixture'
source = (  # instruction, input, output; the same; instruction, context, response in JSONL
    'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/'
    'ch07/01_main-chapter-code/instruction-data.json,'
    'https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json,'
    'https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl'
)
out_dir = 'out/mixture'
train_share = 0.98
test_share = 0.01

init_from = 'gpt2-medium'
block_size = 1024

epochs = 2
batch_size = 8
gradient_accumulation_steps = 16
learning_rate = 2e-5
schedule = 'cosine'
warmup_steps = 30
min_lr = 2e-6
grad_clip = 1.0

eval_interval = 50
eval_iters = 20
save_interval = 200
keep_best = True

max_new_tokens = 256
