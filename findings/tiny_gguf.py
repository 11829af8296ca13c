"""Write a GPT-2 of two blocks with random weights as GGUF: python tiny_gguf.py PATH [--without_template]

The vocabulary is that of single characters. The chat template, where there is one, writes "role: content".
"""

import sys

import numpy
from gguf import GGUFWriter

TEMPLATE = """{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""

path = sys.argv[1]
positions, width, blocks = 2048, 32, 2
writer = GGUFWriter(path, 'gpt2')
writer.add_context_length(positions)
writer.add_embedding_length(width)
writer.add_block_count(blocks)
writer.add_feed_forward_length(4 * width)
writer.add_head_count(2)
writer.add_layer_norm_eps(1e-5)
# a vocabulary of the printable ASCII characters (the space as GPT-2 spells it) and the end-of-text
tokens = [chr(code) for code in range(33, 127)] + ['\u0120', '\u010a', '<|endoftext|>']
writer.add_tokenizer_model('gpt2')
writer.add_tokenizer_pre('gpt-2')
writer.add_token_list(tokens)
writer.add_token_types([1] * (len(tokens) - 1) + [3])
writer.add_token_merges(['h e'])
writer.add_bos_token_id(len(tokens) - 1)
writer.add_eos_token_id(len(tokens) - 1)
writer.add_add_bos_token(False)
if '--without_template' not in sys.argv:
    writer.add_chat_template(TEMPLATE)
random = numpy.random.default_rng(0)


def add(name, *shape):
    writer.add_tensor(name, random.normal(0, 0.3, shape).astype(numpy.float32))


add('token_embd.weight', len(tokens), width)
add('position_embd.weight', positions, width)
add('output_norm.weight', width)
add('output_norm.bias', width)
for block in range(blocks):
    matrices = {'attn_qkv': (3, 1), 'attn_output': (1, 1), 'ffn_up': (4, 1), 'ffn_down': (1, 4)}
    for name, (rows, columns) in matrices.items():
        add(f'blk.{block}.{name}.weight', rows * width, columns * width)
        add(f'blk.{block}.{name}.bias', rows * width)
    for name in ('attn_norm', 'ffn_norm'):
        add(f'blk.{block}.{name}.weight', width)
        add(f'blk.{block}.{name}.bias', width)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
