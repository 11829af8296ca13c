"""
GPT-2 Medium with LoRA: 2 % of the weights are trained, so optimizer and gradients take next to no memory.

    python prepare.py config/sft_medium_lora.py
    python train.py   config/sft_medium_lora.py
    python sample.py  config/sft_medium_lora.py
    python judge.py   config/sft_medium_lora.py
"""
dataset = 'instruction-data'
out_dir = 'out/sft_medium_lora'

init_from = 'gpt2-medium'
lora_rank = 16
lora_alpha = 16.0

epochs = 2
learning_rate = 2e-4  # adapters start at zero and take larger steps

max_new_tokens = 256
