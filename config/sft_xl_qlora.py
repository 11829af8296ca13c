"""
GPT-2 XL (1.5B) with QLoRA: the frozen matrices in 4 bits, so weights and optimizer take 1.3 GB
(and 7 GB while the fp32 weights are loaded and packed).

    pip install bitsandbytes==0.50.2
    python prepare.py config/sft_xl_qlora.py
    python train.py   config/sft_xl_qlora.py
    python sample.py  config/sft_xl_qlora.py
    python judge.py   config/sft_xl_qlora.py
"""
dataset = 'instruction-data'
out_dir = 'out/sft_xl_qlora'

init_from = 'gpt2-xl'
lora_rank = 16
lora_alpha = 16.0
quantize = 'nf4'

epochs = 2
learning_rate = 2e-4

max_new_tokens = 256
