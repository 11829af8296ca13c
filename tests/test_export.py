"""
export.py: every format read by something that is not ours, equal to model.py, and one line for what goes wrong.

`make test` has the packages that write; `make interop` installs those that read (INTEROP=1: none of them may be missing).
"""
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec

import export
from config import UserError
from engine import generate
from lora import add_lora, load_adapter
from model import GPT, GPTConfig, convert_tensors, fingerprint, read_safetensors, transpose_conv1d
from prepare import EOS, VOCAB_SIZE, encode_prompt, format_prompt, get_tokenizer, read_split, to_row

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, TINY, stage
from filelock import FileLock

DEMO = json.loads((ROOT / 'data/demo.json').read_text())[:5000:3] + json.loads((ROOT / 'data/demo_heldback.json').read_text())
IDS = [10, 2000, 30000, 7, EOS, 50, 50255, 0, 198, 628]
FLAGS = ['--dataset=tiny', '--max_new_tokens=8']


def needs(*modules):
    """Skip where a consumer is missing, but not in make interop, which has installed them all."""
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing) and 'INTEROP' not in os.environ, reason=f'needs {", ".join(missing)}: make interop')


def random_texts(count=500):
    """Strings of letters, digits, white space, emoji and whatever else Unicode has, in runs as texts have them."""
    rng = random.Random(0)
    ranges = [(32, 127), (32, 127), (9, 14), (0xA0, 0x250), (0x370, 0x590), (0x590, 0x700), (0x900, 0xE00), (0x2000, 0x2070),
              (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0x1F300, 0x1F700), (0x1F900, 0x1FA00), (0xFE00, 0xFE10)]
    texts = []
    for _ in range(count):
        text = ''
        for _ in range(rng.randint(1, 8)):
            low, high = rng.choice(ranges)
            text += ''.join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6)))
            text += rng.choice(['', ' ', '  ', "'s ", '\n\n'])
        texts.append(text)
    return texts + ['', ' ', '👩‍👩‍👧‍👦 family', "don't I'LL we've", 'a\r\nb', '１２３ ٣٤ 2²', 'x<|endoftext|>y', '\u00ad\u200b\ufeff']


TEXTS = random_texts() + [format_prompt(row) + row['output'] for row in ROWS + DEMO]


# --- runs, and their exports: each format is a fixture of its own


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    """once(name, function) -> function(folder), a text; the first of pytest's workers that asks runs it, in a folder that all share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'exports'
    folder.mkdir(exist_ok=True)

    def once(name, function):
        done = folder / f'{name}.txt'
        with FileLock(folder / f'{name}.lock'):
            if not done.exists():
                text = function(folder)
                done.write_text(text)
            return done.read_text()
    once.folder = folder
    return once


@pytest.fixture(scope='session')
def runs(once):
    """A folder with data/tiny, and a run `full` from scratch. llama.cpp's contexts are whole 256s: so are its positions."""
    def train(folder):
        (folder / 'rows.json').write_text(json.dumps(ROWS))
        stage(folder, 'prepare.py', '--source=rows.json', '--dataset=tiny', '--block_size=128')
        return stage(folder, 'train.py', '--dataset=tiny', '--out_dir=full', *TINY, '--block_size=256', '--dropout=0.05').stdout
    once('runs', train)
    return once.folder


@pytest.fixture(scope='session')
def lora_run(once, runs):
    """A LoRA run upon `full`."""
    flags = ['--dataset=tiny', '--out_dir=lora', *TINY, '--init_from=full/gpt2-2x32-sft.pth', '--lora_rank=4']
    once('lora', lambda folder: stage(folder, 'train.py', *flags).stdout)
    return runs / 'lora'


def export_once(once, name, *flags, run='full'):
    """The folder of a format, and what export.py printed."""
    printed = once(name, lambda folder: stage(folder, 'export.py', f'--out_dir={run}', f'--to={name}', *flags, *FLAGS).stdout)
    return once.folder / run / 'export' / name, printed


@pytest.fixture(scope='session')
def huggingface(once, runs):
    return export_once(once, 'huggingface')


@pytest.fixture(scope='session')
def peft(once, lora_run):
    return export_once(once, 'peft', run='lora')


@pytest.fixture(scope='session')
def onnx(once, runs):
    return export_once(once, 'onnx')


@pytest.fixture(scope='session')
def torchscript(once, runs):
    return export_once(once, 'torchscript')


@pytest.fixture(scope='session')
def gguf_folder(once, runs):
    """Several types, one after the other in one folder, and what was printed. F16 only where a program can read it: it takes time."""
    def write(folder):
        kinds = ['F16', 'F32', 'Q8_0'] if find_spec('llama_cpp') else ['F32', 'Q8_0']
        return ''.join(stage(folder, 'export.py', '--out_dir=full', '--to=gguf', f'--gguf_type={kind}', *FLAGS).stdout for kind in kinds)
    return runs / 'full/export/gguf', once('gguf', write)


@pytest.fixture(scope='session')
def model(runs):
    return GPT.from_pretrained(runs / 'full').eval().requires_grad_(False)


@pytest.fixture
def again(runs, tmp_path):
    """A copy of the run, to be exported in other ways."""
    shutil.copytree(runs / 'full', tmp_path / 'out', ignore=shutil.ignore_patterns('export', 'ckpt.pt'))
    return tmp_path / 'out'


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- Hugging Face


def test_huggingface_weights(huggingface, model):
    """Names and shapes are transformers' own, the values are ours; the output layer is left out."""
    from safetensors.torch import load_file
    state = load_file(huggingface[0] / 'model.safetensors')
    ours = {f'transformer.{name}': p for name, p in model.named_parameters()}
    assert set(state) == set(ours)
    assert state['transformer.h.1.attn.c_attn.weight'].shape == (32, 96)
    assert state['transformer.h.0.mlp.c_proj.weight'].shape == (128, 32)
    for name, p in ours.items():
        assert torch.equal(transpose_conv1d(name, state[name]), p), name
    again = GPT.from_pretrained(huggingface[0]).eval()
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_huggingface_shards(again, runs, model):
    stage(runs, 'export.py', f'--out_dir={again}', '--shard_size=2MB')
    folder = again / 'export/huggingface'
    files = sorted(path.name for path in folder.glob('*.safetensors'))
    assert len(files) > 1 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == 4 * sum(p.numel() for p in model.parameters())
    assert set(index['weight_map'].values()) == set(files)
    state = convert_tensors(read_safetensors(folder / 'model.safetensors.index.json'))
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())


def test_huggingface_settings(huggingface):
    """The dropout is the run's, the limit is the number of positions, and specials are those of GPT-2."""
    folder, _ = huggingface
    config, generation, tokenizer = (json.loads((folder / f'{name}.json').read_text())
                                     for name in ('config', 'generation_config', 'tokenizer_config'))
    assert config['architectures'] == ['GPT2LMHeadModel'] and config['activation_function'] == 'gelu_new'
    assert config['pad_token_id'] == config['eos_token_id'] == EOS and config['n_positions'] == 256
    assert config['resid_pdrop'] == config['embd_pdrop'] == config['attn_pdrop'] == 0.05
    assert generation == {'do_sample': False, 'max_length': 256} | {f'{end}_token_id': EOS for end in ('bos', 'eos', 'pad')}
    assert tokenizer['chat_template'] == export.chat_template() and tokenizer['model_max_length'] == 256
    # TRL 1.16 ends answers with the text of the end-of-text, which must become its id
    assert 'split_special_tokens' not in tokenizer and tokenizer['eos_token'] == '<|endoftext|>'


def test_the_model_card(huggingface, again, monkeypatch):
    """How it was made and from what, without this machine's paths; the base where it is a released one."""
    monkeypatch.setattr(export, 'out_dir', str(again))
    run = json.loads((again / 'gpt2-2x32-sft.json').read_text())
    card = (huggingface[0] / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: mit\n')
    assert run['sha256'] in card and '"learning_rate": 0.001' in card and run['made_of']['data'] in card
    assert 'Scores' not in card and 'base_model' not in card and 'no scores' not in huggingface[1]
    assert export.model_card('gpt2-2x32', run) == card
    paths = dict.fromkeys(('out_dir', 'init_from', 'cache_dir'), '/home/someone/elsewhere')
    assert export.model_card('gpt2-2x32', run | {'config': run['config'] | paths, 'init_from': '/home/someone/elsewhere'}) == card
    for about in run | {'init_from': 'gpt2-medium'}, {'init_from': 'gpt2-medium'}:
        assert '\nbase_model: openai-community/gpt2-medium\n' in export.model_card('gpt2-2x32', about)


def test_the_cards_scores_are_the_models(again, runs, monkeypatch, capsys):
    """scores.txt is copied if scores.json was made of these weights, and left out, with a line, if not."""
    weights = json.loads((again / 'gpt2-2x32-sft.json').read_text())['weights']
    (again / 'scores.json').write_text(json.dumps({'made_of': {'weights': weights}}))
    (again / 'scores.txt').write_text('run: 68.50 [66.00, 71.00] on 0 to 100 by llama3\n')
    printed = stage(runs, 'export.py', f'--out_dir={again}').stdout
    card = (again / 'export/huggingface/README.md').read_text()
    assert 'with 95 % intervals:\n```\nrun: 68.50 [66.00, 71.00] on 0 to 100 by llama3\n```\n' in card and 'no scores' not in printed
    monkeypatch.setattr(export, 'out_dir', str(again))
    for scores in {'made_of': {'weights': weights[::-1]}}, {}:
        (again / 'scores.json').write_text(json.dumps(scores))
        assert '68.50' not in export.model_card('gpt2-2x32', {'init_from': 'scratch', 'weights': weights})
        assert capsys.readouterr().out == f'  the card has no scores: {again}/scores.json is of other weights\n'


def test_the_tokenizer_is_tiktoken(huggingface):
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(huggingface[0] / 'tokenizer.json'))
    tiktoken = get_tokenizer()
    assert tokenizer.token_to_id('<|endoftext|>') == EOS and tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.encode_special_tokens = True  # as transformers does for split_special_tokens
    for text, encoding in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert encoding.ids == tiktoken.encode_ordinary(text) and tokenizer.decode(encoding.ids) == text
    # as it comes, an end-of-text that is written is one
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode('it<|endoftext|>').ids == [270, EOS]


# --- the chat template


def render(messages, **options):
    """Jinja as transformers sets it up, or with other options."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)
    environment = ImmutableSandboxedEnvironment(**options or {'trim_blocks': True, 'lstrip_blocks': True})
    environment.globals['raise_exception'] = raise_exception
    return environment.from_string(export.chat_template()).render(messages=messages, add_generation_prompt=True)


def test_the_chat_template_is_ours():
    """It is one expression, so that nothing depends on how a program treats the white space around blocks."""
    assert '{%' not in export.chat_template() and export.chat_template().count('{{') == 1
    for text in ['Say it.', 'Two\nlines {{ "and" }} a {% brace %}', ' <b>&amp;</b> "quoted" \'s \\n ', 'Käthe 🎉\n', '{input} {instruction}']:
        for options in {}, {'trim_blocks': False}:
            assert render([{'role': 'user', 'content': text}], **options) == format_prompt({'instruction': text})
            messages = [{'role': 'system', 'content': text}, {'role': 'user', 'content': text}]
            assert render(messages, **options) == format_prompt({'instruction': text, 'input': text})


@pytest.mark.parametrize('role', ['system', 'developer'])
def test_a_system_message_is_the_input_as_in_training(role):
    chat = [{'role': role, 'content': 'Be brief.'}, {'role': 'user', 'content': 'Name a tree.'}]
    row = to_row({'messages': [*chat, {'role': 'assistant', 'content': 'Oak.'}]}, {})
    assert row['input'] == 'Be brief.' and render(chat) == format_prompt(row)
    assert render([{'role': role, 'content': ''}, chat[1]]) == format_prompt({'instruction': 'Name a tree.'})


def test_parts_of_messages_are_joined():
    parts = [{'type': 'text', 'text': 'Name '}, {'type': 'image_url', 'image_url': 'x'}, {'type': 'text', 'text': 'a tree.'}]
    assert render([{'role': 'user', 'content': parts}]) == format_prompt({'instruction': 'Name a tree.'})
    messages = [{'role': 'system', 'content': parts}, {'role': 'user', 'content': 'Do.'}]
    assert render(messages) == format_prompt({'instruction': 'Do.', 'input': 'Name a tree.'})


DIALOGUE = [{'role': role, 'content': text} for role, text in
            [('system', 'Be brief.'), ('user', 'Hello'), ('assistant', 'Hi.'), ('user', 'How are you?'), ('assistant', ' "Fine."\n')]]


def test_the_last_message_is_the_instruction():
    """llama.cpp's server renders such a dialogue at its start."""
    assert render(DIALOGUE[:-1]) == format_prompt({'instruction': 'How are you?', 'input': 'Be brief.'})
    assert render(DIALOGUE[1:-1]) == format_prompt({'instruction': 'How are you?'})


@pytest.mark.parametrize('options', [{}, {'trim_blocks': False}])
def test_an_answer_ends_as_in_training(options):
    """An assistant's message at the end is the answer to the last question: so others train the model further."""
    row = {'instruction': 'How are you?', 'input': 'Be brief.'}
    assert render(DIALOGUE, **options) == format_prompt(row) + ' "Fine."\n<|endoftext|>'
    assert render(DIALOGUE[1:3], **options) == format_prompt({'instruction': 'Hello'}) + 'Hi.<|endoftext|>'
    parts = [{'type': 'text', 'text': 'Hi'}, {'type': 'text', 'text': '.'}]
    assert render([DIALOGUE[1], {'role': 'assistant', 'content': parts}]) == render(DIALOGUE[1:3])
    # the prompt of a row is how the whole row begins
    assert render(DIALOGUE).startswith(render(DIALOGUE[:-1]))


@pytest.mark.parametrize('roles', [['assistant'], ['system', 'assistant'], ['user', 'tool'], ['user', 'system'], ['system'], []])
def test_the_chat_template_refuses_what_has_no_question(roles):
    with pytest.raises(ValueError, match='the last message must be one of the user, or an answer to one') as caught:
        render([{'role': role, 'content': 'x'} for role in roles])
    assert '\n' not in str(caught.value)


# --- PEFT


def test_peft_files(peft, runs):
    """W + alpha / r B A, computed from PEFT's file, is the run's merged matrix."""
    from safetensors.torch import load_file
    folder, _ = peft
    config = json.loads((folder / 'adapter_config.json').read_text())
    state = load_file(folder / 'adapter_model.safetensors')
    assert config['fan_in_fan_out'] and config['r'] == 4 and len(state) == 2 * 2 * 4
    # the base is a path of this machine, of no use to others, and maybe a private one
    assert config['base_model_name_or_path'] is None and str(runs) not in json.dumps(config)
    base, merged = (GPT.from_pretrained(runs / run).state_dict() for run in ('full', 'lora/gpt2-2x32-sft.pth'))
    for target in config['target_modules']:
        A, B = (state[f'base_model.model.transformer.h.1.{target}.lora_{part}.weight'] for part in 'AB')
        expected = base[f'h.1.{target}.weight'] + config['lora_alpha'] / config['r'] * B @ A
        torch.testing.assert_close(merged[f'h.1.{target}.weight'], expected, rtol=1e-6, atol=1e-6)
        assert B.abs().max() > 0


@pytest.mark.parametrize('key, value', [('step', 8), ('made_of', {'data': '0' * 64}), ('config', {'lora_rank': 0, 'dataset': 'tiny'})])
def test_an_adapter_of_another_run_is_refused(lora_run, runs, tmp_path, key, value):
    """A full run in the folder of a LoRA run, say, beside whose adapter it lies."""
    shutil.copytree(lora_run, tmp_path / 'out', ignore=shutil.ignore_patterns('export', 'ckpt.pt'))
    edit_json(tmp_path / 'out/gpt2-2x32-sft.json', **{key: value})
    process = stage(runs, 'export.py', f'--out_dir={tmp_path}/out', '--to=peft', code=2)
    assert f'adapter.safetensors is of another run than {tmp_path}/out/gpt2-2x32-sft.json, the newest: its {key} differs' in process.stderr
    assert not (tmp_path / 'out/export').exists()


# --- GGUF


@pytest.fixture(scope='session')
def reader(gguf_folder):
    """The package gguf's; it takes seconds, because of the tokens."""
    import gguf
    return gguf.GGUFReader(gguf_folder[0] / 'gpt2-2x32-F32.gguf')


@pytest.mark.parametrize('kind, bits, file_type', [('F32', 24, 0), ('F16', 11, 1), ('Q8_0', 7, 7)])
def test_gguf_file(reader, runs, tmp_path, monkeypatch, kind, bits, file_type):
    """Read back by the package gguf: names and shapes are those of llama.cpp, the values ours, to so many bits."""
    import gguf
    model = GPT.from_pretrained(runs / 'full').requires_grad_(False)
    if kind != 'F32':
        monkeypatch.setattr(export, 'gguf_type', kind)
        fields = export.gguf_fields(model.config)
        few = {'token_list': fields['token_list'][:9], 'token_types': fields['token_types'][:9], 'token_merges': fields['token_merges'][:9]}
        monkeypatch.setattr(export, 'gguf_fields', lambda shape: fields | few)
        export.write_gguf(model, tmp_path, {'weights': ''})
        reader = gguf.GGUFReader(tmp_path / f'gpt2-2x32-{kind}.gguf')
    names = ['general.architecture', 'gpt2.context_length', 'gpt2.block_count', 'general.file_type', 'general.quantization_version',
             'tokenizer.ggml.eos_token_id', 'tokenizer.ggml.add_bos_token', 'tokenizer.chat_template']
    assert [reader.fields[name].contents() for name in names] == ['gpt2', 256, 2, file_type, 2, EOS, False, export.chat_template()]
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    ours = {'token_embd.weight': 'wte.weight', 'position_embd.weight': 'wpe.weight'}
    ours |= {f'output_norm.{part}': f'ln_f.{part}' for part in ('weight', 'bias')}
    layers = {'attn_norm': 'ln_1', 'attn_qkv': 'attn.c_attn', 'attn_output': 'attn.c_proj', 'ffn_norm': 'ln_2', 'ffn_up': 'mlp.c_fc',
              'ffn_down': 'mlp.c_proj'}
    ours |= {f'blk.{i}.{theirs}.{part}': f'h.{i}.{name}.{part}'
             for i in range(2) for theirs, name in layers.items() for part in ('weight', 'bias')}
    state = model.state_dict()
    assert set(tensors) == set(ours) and set(state) == set(ours.values())
    for theirs, name in ours.items():
        expected = state[name].numpy()
        assert tensors[theirs].shape == expected.shape
        exact = kind == 'F32' or expected.ndim == 1 or name == 'wpe.weight'
        bound = 0 if exact else np.abs(expected).max(1, keepdims=True) * 2.0**-bits
        assert (np.abs(tensors[theirs] - expected) <= bound).all(), name
        assert exact or (tensors[theirs] != expected).any(), name


def test_gguf_tokens(reader):
    """Tokens in the order of their ids, each the bytes that tiktoken has, in GPT-2's form of bytes as letters."""
    letters = export.fast_tokenizer()
    tokens, merges, types = (reader.fields[f'tokenizer.ggml.{name}'].contents() for name in ('tokens', 'merges', 'token_type'))
    for i in (0, 255, 256, 1000, 50255):
        assert letters.id_to_token(i) == tokens[i]
        assert letters.decode([i]).encode() == get_tokenizer().decode_single_token_bytes(i) or '\ufffd' in letters.decode([i])
    assert tokens[EOS] == '<|endoftext|>' and len(tokens) == VOCAB_SIZE and types[EOS] == 3 and set(types[:EOS]) == {1}
    assert merges[0] == 'Ġ t' and len(merges) == 50000


def test_the_modelfile_names_the_newest_type(gguf_folder):
    """What Ollama makes of it: greedy, without its penalty of repetitions; the template is that of the training."""
    lines = (gguf_folder[0] / 'Modelfile').read_text()
    assert 'ollama create gpt2-2x32-q8_0 -f Modelfile\n' in lines and 'ollama run gpt2-2x32-q8_0' in lines
    assert '\nFROM ./gpt2-2x32-Q8_0.gguf\nTEMPLATE """' in lines and 'PARAMETER num_ctx 256\n' in lines and 'PARAMETER num_predict 8\n' in lines
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n' in lines
    # Go's templates: one branch with a system text, one without
    condition, with_system, without = lines.split('"""')[1].replace('{{ end }}', '').replace('{{ if .System }}', '{{ else }}').split('{{ else }}')
    assert condition == '' and without.replace('{{ .Prompt }}', 'Say it.') == format_prompt({'instruction': 'Say it.'})
    expected = format_prompt({'instruction': 'Say it.', 'input': 'Be brief.'})
    assert with_system.replace('{{ .Prompt }}', 'Say it.').replace('{{ .System }}', 'Be brief.') == expected


def test_other_types_stay_if_they_are_of_the_same_weights(gguf_folder, again, runs, tmp_path, capsys):
    """The Modelfile tells of which weights the files are; those of other weights, or of unknown ones, do not stay."""
    found = sorted(path.name for path in gguf_folder[0].iterdir())
    assert found[0] == 'Modelfile' and {'gpt2-2x32-F32.gguf', 'gpt2-2x32-Q8_0.gguf'} <= set(found) and 'removed' not in gguf_folder[1]
    weights = json.loads((again / 'gpt2-2x32-sft.json').read_text())['weights']
    assert (gguf_folder[0] / 'Modelfile').read_text().startswith(f'# weights: {weights}\n')
    folder = again / 'export/gguf'
    folder.mkdir(parents=True)
    (folder / 'old-F16.gguf').write_text('of another training')
    (folder / 'Modelfile').write_text(f'# weights: {weights[::-1]}\n')
    # without its consumer, which would only take time here
    printed = stage(runs, 'export.py', f'--out_dir={again}', '--to=gguf', first='import sys; sys.modules["llama_cpp"] = None').stdout
    assert f'removed {folder}/old-F16.gguf, which is of other weights\n' in printed
    assert sorted(path.name for path in folder.iterdir()) == ['Modelfile', 'gpt2-2x32-F32.gguf']
    # a file of unknown weights, without a Modelfile
    (tmp_path / 'old.gguf').write_text('')
    export.keep_other_types(tmp_path, folder, weights)
    assert 'removed' in capsys.readouterr().out and not (folder / 'old.gguf').exists()


def test_shapes_that_gguf_or_llama_cpp_lack(gguf_folder, run, tmp_path, capsys):
    """48 channels are no whole 32s, and Q8_0 is refused, with nothing left behind; 64 positions are no whole 256s: a warning."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=3, n_embd=48, block_size=64)).requires_grad_(False)
    torch.save(model.state_dict(), tmp_path / 'odd.pth')
    (tmp_path / 'odd.json').write_text(json.dumps({'model': vars(model.config)}))
    process = run('export.py', '--init_from=odd.pth', '--out_dir=out', '--to=gguf', '--gguf_type=Q8_0', code=2)
    assert 'Q8_0 takes an n_embd of whole 32s, not 48' in process.stderr
    assert not list((tmp_path / 'out/export').iterdir())
    export.write_gguf(model, tmp_path, {'weights': ''})
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and 'llama.cpp rounds contexts up to whole 256s, and so beyond the 64 positions' in printed
    assert 'warning' not in gguf_folder[1]


# --- ONNX and torch's own programs


def feeds(model, ids, past=None, mask=None, positions=None):
    """Optimum's inputs for rows of ids."""
    ids = np.array(ids)
    c = model.config
    past = past or [np.zeros((len(ids), c.n_head, 0, c.n_embd // c.n_head), np.float32)] * (2 * c.n_layer)
    start = past[0].shape[2]
    end = start + ids.shape[1]
    if mask is None:
        mask = np.ones((len(ids), end), int)
        positions = np.tile(np.arange(start, end), (len(ids), 1))
    inputs = {'input_ids': ids, 'attention_mask': np.array(mask), 'position_ids': np.array(positions)}
    return inputs | {f'past_key_values.{i // 2}.{("key", "value")[i % 2]}': kv for i, kv in enumerate(past)}


def onnx_run(path):
    """run(feeds) -> outputs, by onnxruntime, else by onnx's own reference, operator by operator in numpy."""
    if find_spec('onnxruntime'):
        from onnxruntime import InferenceSession
        session = InferenceSession(path)
    else:
        from onnx.reference import ReferenceEvaluator
        session = ReferenceEvaluator(str(path))
    return lambda feeds: session.run(None, feeds)


def test_onnx_has_the_layout_of_transformers_js(onnx):
    files = sorted(str(path.relative_to(onnx[0])) for path in onnx[0].rglob('*') if path.is_file())
    assert files == ['config.json', 'generation_config.json', 'onnx/model.onnx', 'tokenizer.json', 'tokenizer_config.json']


def test_onnx_is_pinned_and_named_as_optimum(onnx):
    import onnx as package
    graph = package.load(onnx[0] / 'onnx/model.onnx')
    assert graph.ir_version == 10 and [(one.domain, one.version) for one in graph.opset_import if not one.domain] == [('', 18)]
    assert {one.domain for one in graph.opset_import} <= {'', 'pkg.onnxscript.torch_lib.common'}
    past = [f'{{}}.{layer}.{part}' for layer in range(2) for part in ('key', 'value')]
    assert [one.name for one in graph.graph.input] == ['input_ids', 'attention_mask', 'position_ids',
                                                       *(name.format('past_key_values') for name in past)]
    assert [one.name for one in graph.graph.output] == ['logits', *(name.format('present') for name in past)]
    package.checker.check_model(graph, full_check=True)


def test_onnx_prefill_decode_and_pads(onnx, model):
    run = onnx_run(onnx[0] / 'onnx/model.onnx')
    expected = logits_of(model, IDS).numpy()
    logits, *past = run(feeds(model, [IDS]))
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
    # one by one, then the rest at once
    _, *past = run(feeds(model, [IDS[:3]]))
    logits, *past = run(feeds(model, [IDS[3:4]], past))
    np.testing.assert_allclose(logits[0, 0], expected[3], atol=1e-5)
    logits, *past = run(feeds(model, [IDS[4:]], past))
    np.testing.assert_allclose(logits[0], expected[4:], atol=1e-5)
    assert past[0].shape == (1, 2, len(IDS), 16)
    # a batch, padded on the left
    mask = [[0] * 4 + [1] * 6, [1] * 10]
    positions = [[0] * 4 + [*range(6)], [*range(10)]]
    logits, *_ = run(feeds(model, [[EOS] * 4 + IDS[:6], IDS], mask=mask, positions=positions))
    np.testing.assert_allclose(logits[0, 4:], expected[:6], atol=1e-5)
    np.testing.assert_allclose(logits[1], expected, atol=1e-5)
    assert np.isfinite(logits).all()


def graph_step(model):
    """A step as the readers have it, of the function that becomes the ONNX graph."""
    def step(ids, past):
        c = model.config
        past = past or [tuple(torch.zeros(2, 1, c.n_head, 0, c.n_embd // c.n_head))] * c.n_layer
        end = past[0][0].size(2) + ids.size(1)
        positions = torch.arange(end)[None]
        return export.forward_with_past(model, ids, torch.ones_like(positions), positions[:, -ids.size(1):], past)
    return step


def test_greedy_ids():
    """They are model.py's, up to the end-of-text or the limit."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=300)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5)
    step = graph_step(model)
    with torch.no_grad():
        for length in 1, 10, 3:
            prompt = [id % 300 for id in IDS[:length]]
            expected = model.generate(prompt, 12, eos=-1)
            assert export.greedy_ids(step, prompt, 12, eos=-1) == expected
            # an id that comes first in the middle of an answer
            eos = next(id for i, id in enumerate(expected) if i > 1 and id not in expected[:i])
            assert export.greedy_ids(step, prompt, 12, eos=eos) == expected[:expected.index(eos)]


def test_what_a_type_costs(model, runs, monkeypatch, capsys):
    """A step that computes the same costs nothing; one whose logits are those of other ids costs something."""
    monkeypatch.chdir(runs)
    monkeypatch.setitem(export.config, 'dataset', 'tiny')
    monkeypatch.setattr(export, 'max_new_tokens', 8)
    step = graph_step(model)

    def wrong(ids, past):
        logits, past = step(ids, past)
        return logits.roll(1, dims=2), past

    export.compare_lossy(model, {'right': step, 'wrong': wrong})
    fp32, right, other = capsys.readouterr().out.splitlines()
    equal = 'exact match 0.00 % of 6 test rows, 100.00 % of greedy ids equal'
    assert fp32 == '  in fp32: ' + equal and right == '  right: ' + equal
    assert other.startswith('  wrong: ') and ' 100.00 % of greedy ids equal' not in other
    # an exact match is one in the text
    rows = [row | {'output': ' ' + get_tokenizer().decode(model.generate(encode_prompt(row), 8))} for row in read_split('tiny', 'test').meta['rows']]
    read = export.read_test_split
    monkeypatch.setattr(export, 'read_test_split', lambda *given: read(*given)._replace(meta=read(*given).meta | {'rows': rows}))
    export.compare_lossy(model, {'exported': step})
    assert capsys.readouterr().out.count('exact match 100.00 % of 6 test rows') == 2


def test_torchscript_without_this_repository(torchscript, model, tmp_path):
    """Both programs in a process that has torch and no file of ours, for one row and for several."""
    folder, _ = torchscript
    code = f"""
import sys, torch
script, program = torch.jit.load({str(folder / 'gpt2-2x32.pt')!r}), torch.export.load({str(folder / 'gpt2-2x32.pt2')!r}).module()
ids = torch.tensor([{IDS}, {IDS[::-1]}])
torch.save([f(x) for f in (script, program) for x in (ids, ids[:1], ids[:, :1])], 'logits.pt')
assert not {{'model', 'config', 'prepare', 'lora'}} & set(sys.modules)
"""
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
    ids = torch.tensor([IDS, IDS[::-1]])
    expected = [model(x) for x in (ids, ids[:1], ids[:, :1])] * 2
    for theirs, ours in zip(torch.load(tmp_path / 'logits.pt'), expected):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


# --- what goes wrong


@pytest.mark.parametrize('flags, said', [
    (['--to=ggml'], 'may name huggingface, peft, gguf, onnx, torchscript'),
    (['--to=gguf', '--gguf_type=Q4_0'], "gguf_type='Q4_0' must be one of F32, F16, Q8_0"),
    (['--to=onnx', '--onnx_type=float16'], "onnx_type='float16' must be one of float32, int8"),
    (['--max_new_tokens=0'], 'max_new_tokens=0 must be at least 1'),
    (['--to=huggingface,peft'], 'out has no adapter.safetensors, which a run with lora_rank > 0 writes'),
    (['--out_dir=absent'], 'absent does not exist: train one'),
    (['--init_from=absent.pth'], 'absent.pth is not a checkpoint'),
])
def test_mistakes_end_in_one_line(again, runs, flags, said):
    assert said in stage(runs, 'export.py', f'--out_dir={again}', *flags, code=2).stderr
    assert not (again / 'export').exists() and not (runs / 'absent').exists()


def test_weights_that_are_not_the_runs(again, runs):
    """Their fingerprint is in the run's .json."""
    state = torch.load(again / 'gpt2-2x32-sft.pth')
    state['ln_f.bias'] += 1
    torch.save(state, again / 'gpt2-2x32-sft.pth')
    process = stage(runs, 'export.py', f'--out_dir={again}', code=2)
    assert 'was made with other weights than these' in process.stderr and 'gpt2-2x32-sft.pth was replaced' in process.stderr
    assert not (again / 'export').exists()


def test_a_missing_package_is_named(again, runs):
    """Before anything is written: gguf is hidden from the process."""
    process = stage(runs, 'export.py', f'--out_dir={again}', '--to=huggingface,gguf', code=2, first='import sys; sys.modules["gguf"] = None')
    assert 'gguf' in process.stderr and 'pip install ' in process.stderr
    assert not (again / 'export').exists()


def test_a_missing_consumer_is_named(again, runs):
    process = stage(runs, 'export.py', f'--out_dir={again}', first='import sys; sys.modules["transformers"] = None')
    assert 'written, not verified: ' in process.stdout and 'transformers' in process.stdout and 'pip install ' in process.stdout
    assert (again / 'export/huggingface/model.safetensors').exists()


def test_a_test_split_that_cannot_be_answered(model, runs, monkeypatch):
    """It is missing, or has longer rows than the model: that is no fault of the export."""
    monkeypatch.chdir(runs)
    monkeypatch.setitem(export.config, 'dataset', 'absent')
    with pytest.raises(UserError, match='absent'):
        export.compare_lossy(model, {'exported': graph_step(model)})
    monkeypatch.setitem(export.config, 'dataset', 'tiny')
    short = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=32))
    with pytest.raises(UserError, match='has a test row of .* tokens, the model 32 positions'):
        export.compare_lossy(short, {'exported': graph_step(short)})


def test_ids_beyond_the_tokenizers_are_left_out(tmp_path):
    """A vocabulary with an added [PAD]: the exported model has the ids that its tokenizer knows."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=256, vocab_size=VOCAB_SIZE + 1))
    torch.save(model.state_dict(), tmp_path / 'pad.pth')
    (tmp_path / 'pad.json').write_text(json.dumps({'model': vars(model.config)}))
    loaded = export.load_model('huggingface', None, {'init_from': tmp_path / 'pad.pth'})
    assert loaded.config.vocab_size == VOCAB_SIZE and torch.equal(loaded.wte.weight, model.wte.weight[:-1])


def test_another_vocabulary_is_refused(run, tmp_path):
    """OpenAI's form, 257 ids: no format has a tokenizer for them."""
    process = run('export.py', f'--init_from={ROOT}/tests/fixtures/openai-tiny', '--out_dir=out', code=2)
    assert "openai-tiny has 257 ids, not the 50257 of GPT-2's tokenizer" in process.stderr
    assert not (tmp_path / 'out/export').exists()


@pytest.mark.parametrize('name', ['huggingface', 'gguf', 'torchscript'])
def test_a_full_disk(again, runs, name):
    """No file may pass 4,000 bytes: one line, and the earlier export is kept."""
    (again / 'export' / name).mkdir(parents=True)
    (again / 'export' / name / 'before').write_text('')
    process = stage(runs, 'export.py', f'--out_dir={again}', f'--to={name}', code=2,
                    first='import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))')
    assert f'cannot write {again}/export/{name}' in process.stderr
    assert [path.name for path in (again / 'export').iterdir()] == [name] and (again / 'export' / name / 'before').exists()


# a consumer that adds an error to a logit of each prompt
TRANSFORMERS = """
import sys, types, torch
from model import GPT
def from_pretrained(folder):
    model = GPT.from_pretrained(folder).eval()
    def net(input_ids, past_key_values, use_cache):
        ids = input_ids if past_key_values is None else torch.cat((past_key_values, input_ids), dim=1)
        logits = model(ids)[:, -input_ids.size(1):]
        if past_key_values is None:
            logits[0, 3, 1000] += ERROR
        return types.SimpleNamespace(logits=logits, past_key_values=ids)
    return net
for name in 'transformers', 'transformers.utils', 'transformers.utils.logging':
    sys.modules[name] = types.ModuleType(name)
sys.modules['transformers'].AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=from_pretrained)
sys.modules['transformers.utils.logging'].disable_progress_bar = lambda: None
"""


@pytest.mark.parametrize('error', ['0.0', '0.001', 'float("nan")'])
def test_a_wrong_export_is_found(again, runs, error):
    """A consumer whose logits are off at one position: exit 1, the folder set aside, the earlier export kept."""
    is_right = error == '0.0'
    (again / 'export/huggingface').mkdir(parents=True)
    (again / 'export/huggingface/before').write_text('')
    process = stage(runs, 'export.py', f'--out_dir={again}', code=0 if is_right else 1, first=TRANSFORMERS.replace('ERROR', error))
    assert 'greedy ids of 3 of 3 prompts equal' in process.stdout
    if is_right:
        assert [path.name for path in (again / 'export').iterdir()] == ['huggingface'] and not (again / 'export/huggingface/before').exists()
        return
    assert process.stderr.startswith('export.py: ') and 'huggingface.failed does not compute what model.py does' in process.stderr
    assert process.stderr.count('\n') == 1
    assert f'largest difference of logits {"nan" if "nan" in error else "1.0e-03"}' in process.stdout
    assert sorted(path.name for path in (again / 'export').iterdir()) == ['huggingface', 'huggingface.failed']
    assert (again / 'export/huggingface/before').exists()


@pytest.mark.parametrize('scale, is_right', [(1.0, False), (40.0, True)])
def test_what_may_differ_grows_with_the_logits(monkeypatch, tmp_path, scale, is_right):
    """The same error, 3e-4, is a fault where the largest logit is 1, and rounding where it is 40 and more."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.arange(6)[None]
    logits = scale * torch.rand(1, 6, 8, generator=draw).round(decimals=3) + 3 * scale * torch.nn.functional.one_hot((ids + 1) % 8, 8)
    expected = [(ids[:, :3], ids[:, 3:], logits)]

    def step(new_ids, past):
        there = past or 0
        found = logits[:, there:there + new_ids.size(1)].clone()
        found[0, 0, 0] += 3e-4
        return found, there + new_ids.size(1)

    monkeypatch.setitem(export.FORMATS, 'torchscript', (None, lambda folder, base: {'a program': step}, ()))
    with contextlib.nullcontext() if is_right else pytest.raises(ValueError, match='may differ by 1.*e-04'):
        export.verify('torchscript', tmp_path, None, '', expected)


# --- with the programs that read: make interop


def test_a_format_may_lie_on_another_disk(again, runs, tmp_path):
    """export/huggingface is a link then, which stays one; a file of that name is told."""
    (tmp_path / 'disk/there').mkdir(parents=True)
    (again / 'export').mkdir()
    (again / 'export/huggingface').symlink_to(tmp_path / 'disk/there')
    stage(runs, 'export.py', f'--out_dir={again}', first=TRANSFORMERS.replace('ERROR', '0.0'))
    assert (again / 'export/huggingface').is_symlink() and (tmp_path / 'disk/there/model.safetensors').exists()
    assert [path.name for path in (tmp_path / 'disk').iterdir()] == ['there']
    (again / 'export/huggingface').unlink()
    (again / 'export/huggingface').write_text('')
    assert 'export/huggingface is a file: remove it' in stage(runs, 'export.py', f'--out_dir={again}', code=2).stderr
    assert 'must be like 5GB' in stage(runs, 'export.py', f'--out_dir={again}', '--shard_size=-5MB', code=2).stderr


CONSUMERS = ['transformers', 'peft', 'llama_cpp', 'onnxruntime']


@needs(*CONSUMERS)
def test_all_are_verified(huggingface, peft, gguf_folder, onnx, torchscript):
    for (_, printed), programs in ((huggingface, 1), (peft, 1), (gguf_folder, 3), (onnx, 1), (torchscript, 2)):
        assert printed.count('greedy ids of 3 of 3 prompts equal') == programs and 'not verified' not in printed
    assert gguf_folder[1].count('  exported: exact match ') == 2 and gguf_folder[1].count(' % of greedy ids equal\n') == 4


@needs('onnxruntime')
def test_int8_in_transformers_js_layout(again, runs):
    """
    What it costs is said of one prompt at a time, and of prompts in a batch: onnxruntime's dynamic quantization takes one scale for
    all values of a call (1.32).
    """
    printed = stage(runs, 'export.py', f'--out_dir={again}', '--to=onnx', '--onnx_type=int8', *FLAGS).stdout
    assert 'onnxruntime, model: largest difference' in printed and 'onnxruntime, model_quantized: largest difference' in printed
    for how in 'in fp32', 'exported', 'exported, in a batch':
        assert f'  {how}: exact match ' in printed
    assert printed.count('% of greedy ids equal\n') == 3
    folder = again / 'export/onnx/onnx'
    assert sorted(path.name for path in folder.iterdir()) == ['model.onnx', 'model_quantized.onnx']
    assert (folder / 'model_quantized.onnx').stat().st_size < 0.8 * (folder / 'model.onnx').stat().st_size


@needs('transformers')
def test_transformers_takes_the_folder(huggingface, model):
    """Model, tokenizer, chat template and pipeline, with no further argument; a batch, padded by its own settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    folder, _ = huggingface
    net = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(net(input_ids=torch.tensor([IDS])).logits[0], logits_of(model, IDS), rtol=0, atol=1e-5)
    assert net.config.resid_pdrop == net.config.attn_pdrop == net.config.embd_pdrop == 0.05
    texts = [text for text in TEXTS[::7] if '<|endoftext|>' not in text]
    for text, ids in zip(texts, tokenizer(texts)['input_ids']):
        assert ids == get_tokenizer().encode_ordinary(text)
    row = {'instruction': 'Write the word cat.', 'input': 'Be brief.'}
    messages = [{'role': 'system', 'content': row['input']}, {'role': 'user', 'content': row['instruction']}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == format_prompt(row)
    answered = [*messages, {'role': 'assistant', 'content': 'Cat.'}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == format_prompt(row) + 'Cat.<|endoftext|>'
    with pytest.raises(Exception, match='the last message must be one of the user'):
        tokenizer.apply_chat_template(messages[:1], tokenize=False)
    generate = pipeline('text-generation', str(folder))
    answer = get_tokenizer().decode(model.generate(encode_prompt(row), 8))
    assert generate(messages, max_new_tokens=8)[0]['generated_text'][-1]['content'] == answer
    prompts = [format_prompt(row) for row in ROWS[:3]]
    expected = [get_tokenizer().decode(model.generate(encode_prompt(row), 8)) for row in ROWS[:3]]
    batch = tokenizer(prompts, return_tensors='pt', padding=True)
    new = net.generate(**batch, max_new_tokens=8)[:, batch['input_ids'].size(1):]
    assert tokenizer.batch_decode(new, skip_special_tokens=True) == expected
    # a prompt may be as long as the model: with max_new_tokens in its settings transformers 5.23 ends in an IndexError
    long = torch.tensor([IDS * 25 + [7] * 5])
    net.generation_config.eos_token_id = None
    assert net.generate(long).shape == (1, 256)


@needs('trl', 'datasets')
@pytest.mark.parametrize('kind', ['texts', 'messages'])
def test_trl_learns_to_stop(huggingface, tmp_path, kind):
    """The last label of a row is 50256, behind the answer's own: TRL writes the end-of-text itself, or our template does."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    rows = []
    for row in ROWS[:4]:
        prompt, completion = format_prompt(row), row['output']
        if kind == 'messages':
            prompt = [{'role': 'user', 'content': row['instruction']}]
            if row['input']:
                prompt.insert(0, {'role': 'system', 'content': row['input']})
            completion = [{'role': 'assistant', 'content': completion}]
        rows.append({'prompt': prompt, 'completion': completion})
    settings = SFTConfig(str(tmp_path), report_to='none', use_cpu=True, max_steps=1, per_device_train_batch_size=4, save_strategy='no')
    trainer = SFTTrainer(str(huggingface[0]), args=settings, train_dataset=Dataset.from_list(rows))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    for row, ids, labels in zip(ROWS, batch['input_ids'].tolist(), batch['labels'].tolist()):
        learned = [label for label in labels if label != -100]
        assert learned == get_tokenizer().encode_ordinary(row['output']) + [EOS]
        assert ids[:len(encode_prompt(row))] == encode_prompt(row)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]['train_loss'])


@needs('peft')
def test_peft_takes_the_adapter(huggingface, peft, runs):
    """Upon the exported base, the logits of our adapter to 1e-5."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(huggingface[0])
    with torch.no_grad():
        plain = base(input_ids=torch.tensor([IDS])).logits[0]
        theirs = PeftModel.from_pretrained(base, peft[0])(input_ids=torch.tensor([IDS])).logits[0]
    ours = GPT.from_pretrained(runs / 'full').eval()
    load_adapter(ours, runs / 'lora/adapter.safetensors')
    torch.testing.assert_close(theirs, logits_of(ours, IDS), rtol=0, atol=1e-5)
    assert (theirs - plain).abs().max() > 1e-4


@needs('peft')
def test_peft_takes_a_strong_adapter(tmp_path):
    """Other matrices, rank and alpha, and values far from zero."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)).eval()
    torch.save(model.state_dict(), tmp_path / 'base-sft.pth')
    (tmp_path / 'base-sft.json').write_text(json.dumps({'model': vars(model.config)}))
    add_lora(model, 8, 24.0, targets='attn.c_proj, mlp.c_fc')
    for name, p in model.named_parameters():
        if name.endswith(('.A', '.B')):
            torch.nn.init.normal_(p, std=0.1)
    export.write_peft(model, tmp_path, {'init_from': 'somewhere'})
    step = export.read_peft(tmp_path, tmp_path / 'base-sft.pth')['peft']
    ids = torch.tensor([IDS])
    with torch.no_grad():
        torch.testing.assert_close(step(ids, None)[0][0], logits_of(model, IDS), rtol=0, atol=1e-5)


CAT = {'instruction': 'Write the word cat.', 'input': 'Be brief.'}


@needs('llama_cpp')
def test_llama_cpp_takes_the_file(gguf_folder, model):
    """Its tokenizer, and a chat through the template that the file holds."""
    from llama_cpp import Llama
    llama = Llama(str(gguf_folder[0] / 'gpt2-2x32-F32.gguf'), n_ctx=256, verbose=False)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == get_tokenizer().encode_ordinary(text), text
    messages = [{'role': 'system', 'content': CAT['input']}, {'role': 'user', 'content': CAT['instruction']}]
    reply = llama.create_chat_completion(messages, temperature=0, max_tokens=8)
    answer = get_tokenizer().decode(model.generate(encode_prompt(CAT), 8))
    assert reply['choices'][0]['message']['content'].strip() == answer.strip()
    assert reply['usage']['prompt_tokens'] == len(encode_prompt(CAT))
    with pytest.raises(Exception, match='the last message must be one of the user'):
        llama.create_chat_completion(messages[:1])


@needs('xllamacpp')
def test_llama_cpps_server_takes_the_file(gguf_folder, model, tmp_path):
    """It renders a dialogue at its start. A system message, and a message in parts, are as in training."""
    code = f"""
import json, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = {str(gguf_folder[0] / 'gpt2-2x32-F32.gguf')!r}
params.n_parallel = params.cpuparams.n_threads = 1
params.n_ctx = 256
params.warmup = False
server = xllamacpp.Server(params)
parts = [{{'type': 'text', 'text': {CAT['instruction']!r}}}]
chats = [[{{'role': 'system', 'content': {CAT['input']!r}}}, {{'role': 'user', 'content': {CAT['instruction']!r}}}],
         [{{'role': 'system', 'content': {CAT['input']!r}}}, {{'role': 'user', 'content': parts}}]]
replies = [server.handle_chat_completions({{'messages': chat, 'temperature': 0, 'max_tokens': 8}}) for chat in chats]
json.dump(replies, open('replies.json', 'w'))
"""
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True)
    answer = get_tokenizer().decode(model.generate(encode_prompt(CAT), 8))
    for reply in json.loads((tmp_path / 'replies.json').read_text()):
        reply = json.loads(reply) if isinstance(reply, str) else reply
        assert reply['choices'][0]['message']['content'].strip() == answer.strip()
        assert reply['usage']['prompt_tokens'] == len(encode_prompt(CAT))


@needs(*CONSUMERS)
def test_small_shape(tmp_path):
    """GPT-2 small's shape, random weights, all formats."""
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    torch.save(model.state_dict(), tmp_path / 'small.pth')
    printed = stage(tmp_path, 'export.py', '--init_from=small.pth', '--to=huggingface,gguf,onnx,torchscript', timeout=400).stdout
    assert printed.count('greedy ids of 3 of 3 prompts equal') == 5 and 'not verified' not in printed


@needs(*CONSUMERS)
def test_the_demo_answers_alike_everywhere(tmp_path_factory):
    """The demo's model, trained for a little while on a tenth of its rows: its test answers are equal id by id in all programs."""
    folder = tmp_path_factory.mktemp('demo')
    (folder / 'data').mkdir()
    for name in 'demo_start.pth', 'demo_start.json':
        shutil.copy(ROOT / 'data' / name, folder / 'data')
    (folder / 'data/demo.json').write_text(json.dumps(json.loads((ROOT / 'data/demo.json').read_text())[::10]))
    config = ROOT / 'config/demo.py'
    stage(folder, 'prepare.py', config)
    stage(folder, 'train.py', config, '--max_steps=150')
    formats = ['huggingface', 'gguf', 'onnx', 'torchscript']
    printed = stage(folder, 'export.py', config, f'--to={",".join(formats)}').stdout
    assert printed.count('greedy ids of 3 of 3 prompts equal') == 5
    [path] = (folder / 'out/demo').glob('*-sft.pth')
    model = GPT.from_pretrained(path).eval()
    prompts = [encode_prompt(row) for row in json.loads((folder / 'data/demo/test.json').read_text())['rows']]
    answers = generate(model, prompts, 24)
    assert len(prompts) == 90 and sum(map(len, answers)) > 400 and len(set(map(tuple, answers))) > 40
    for name in formats:
        _, read, _ = export.FORMATS[name]
        for program, step in read(folder / 'out/demo/export' / name, '').items():
            # torch's own programs keep no keys and values, and so take long
            n = 20 if name == 'torchscript' else len(prompts)
            with torch.no_grad():
                found = [export.greedy_ids(step, prompt, 24) for prompt in prompts[:n]]
            assert found == answers[:n], program
    # and the exported folder is a model for sample.py, too
    again = GPT.from_pretrained(folder / 'out/demo/export/huggingface')
    assert fingerprint(dict(again.named_parameters())) == fingerprint(dict(model.named_parameters()))
