"""
export.py: every format read by something that is not ours, equal to model.py, and one line for what goes wrong.

`make test` has the packages that write; `make interop` installs those that read (INTEROP=1: none of them may be missing).
"""
import json
import os
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, TINY, stage
from filelock import FileLock

from export import CHAT_TEMPLATE, fast_tokenizer, open_exported
from lora import add_lora, load_adapter
from model import GPT, GPTConfig, read_safetensors, transpose_conv1d
from prepare import EOS, encode_prompt, format_prompt, get_tokenizer

DEMO = json.loads((ROOT / 'data/demo.json').read_text())[:5000] + json.loads((ROOT / 'data/demo_heldback.json').read_text())
IDS = [10, 2000, 30000, 7, EOS, 50, 50255, 0, 198, 628]


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
            text += ''.join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6))) + rng.choice(['', ' ', '  ', "'s ", '\n\n'])
        texts.append(text)
    return texts + ['', ' ', '👩‍👩‍👧‍👦 family', "don't I'LL we've", 'a\r\nb', '１２３ ٣٤ 2²', 'x<|endoftext|>y', '\u00ad\u200b\ufeff']


TEXTS = random_texts() + [format_prompt(row) + row['output'] for row in ROWS + DEMO]


# --- runs to export


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
    """A folder with data/tiny, a run `full` from scratch, and a LoRA run `lora` upon it."""
    def train(folder):
        (folder / 'rows.json').write_text(json.dumps(ROWS))
        stage(folder, 'prepare.py', '--source=rows.json', '--dataset=tiny', '--block_size=128')
        stage(folder, 'train.py', '--dataset=tiny', '--out_dir=full', '--epochs=1', *TINY)
        base = folder / 'full/gpt2-2x32-sft.pth'
        return stage(folder, 'train.py', '--dataset=tiny', '--out_dir=lora', '--epochs=1', *TINY, f'--init_from={base}', '--lora_rank=4').stdout
    once('runs', train)
    return once.folder


FLAGS = ['--dataset=tiny', '--max_new_tokens=8']
FORMATS = ['huggingface', 'gguf', 'onnx', 'torchscript']


@pytest.fixture(scope='session')
def exported(once, runs):
    """-> (the run's export folder with every format, in F32; what was printed)."""
    flags = ['--out_dir=full', f'--to={",".join(FORMATS)}', *FLAGS]
    return runs / 'full/export', once('exported', lambda folder: stage(folder, 'export.py', *flags).stdout)


@pytest.fixture(scope='session')
def adapter(once, runs):
    flags = ['--out_dir=lora', '--to=peft', *FLAGS]
    return runs / 'lora/export/peft', once('adapter', lambda folder: stage(folder, 'export.py', *flags).stdout)


@pytest.fixture(scope='session')
def lossy(once, exported):
    """-> {type: what was printed}, each written beside the others."""
    flags = {'F16': ['--to=gguf', '--gguf_type=F16'], 'Q8_0': ['--to=gguf', '--gguf_type=Q8_0']}
    if find_spec('onnxruntime'):  # which quantizes
        flags['int8'] = ['--to=onnx', '--onnx_type=int8']
    return {kind: once(kind, lambda folder, kind=kind: stage(folder, 'export.py', '--out_dir=full', *flags[kind], *FLAGS).stdout)
            for kind in flags}


@pytest.fixture
def again(runs, tmp_path):
    """A copy of the run, to be exported in other ways."""
    shutil.copytree(runs / 'full', tmp_path / 'out', ignore=shutil.ignore_patterns('export', 'ckpt.pt'))
    return tmp_path / 'out'


@pytest.fixture
def model(runs):
    return GPT.from_pretrained(runs / 'full').eval()


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids]))[0][0]


# --- Hugging Face


def test_huggingface_weights(exported, model):
    """Names and shapes are transformers' own, the values are ours; the output layer is left out."""
    from safetensors.torch import load_file
    state = load_file(exported[0] / 'huggingface' / 'model.safetensors')
    ours = {f'transformer.{name}': p for name, p in model.named_parameters()}
    assert set(state) == set(ours)
    assert state['transformer.h.1.attn.c_attn.weight'].shape == (32, 96) and state['transformer.h.0.mlp.c_proj.weight'].shape == (128, 32)
    for name, p in ours.items():
        assert torch.equal(transpose_conv1d(name, state[name]), p), name
    again = GPT.from_pretrained(exported[0] / 'huggingface').eval()
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_huggingface_shards(again, runs, model):
    stage(runs, 'export.py', f'--out_dir={again}', '--shard_size=2MB')
    folder = again / 'export/huggingface'
    files = sorted(path.name for path in folder.glob('*.safetensors'))
    assert len(files) > 1 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == 4 * sum(p.numel() for p in model.parameters())
    assert set(index['weight_map'].values()) == set(files)
    fields, state = read_safetensors(folder / 'model.safetensors.index.json')
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())


def test_huggingface_settings(exported):
    folder = exported[0] / 'huggingface'
    config, generation, tokenizer = (json.loads((folder / f'{name}.json').read_text())
                                     for name in ('config', 'generation_config', 'tokenizer_config'))
    assert config['architectures'] == ['GPT2LMHeadModel'] and config['activation_function'] == 'gelu_new'
    assert config['pad_token_id'] == config['eos_token_id'] == EOS and config['n_positions'] == 128
    assert generation == {'do_sample': False, 'max_new_tokens': 8} | {f'{end}_token_id': EOS for end in ('bos', 'eos', 'pad')}
    assert tokenizer['chat_template'] == CHAT_TEMPLATE and tokenizer['model_max_length'] == 128


def test_the_model_card(exported, again, runs):
    """It names the data's hash, the settings, and the scores where there are some."""
    run = json.loads((again / 'gpt2-2x32-sft.json').read_text())
    card = (exported[0] / 'huggingface/README.md').read_text()
    assert card.startswith('---\n') and run['sha256'] in card and '"learning_rate": 0.001' in card and 'Scores' not in card
    intervals = [{'value': value, 'low': value - 2.5, 'high': value + 2.5} for value in (51.25, 68.5)]
    (again / 'scores.json').write_text(json.dumps({
        'metrics': {'all': {'exact match %': {'run': intervals[0]}}}, 'compared_with': '', 'scale': [0, 100], 'faults': [],
        'judge': {'kind': 'ollama', 'model': 'llama3'},
        'summary': {'run': {'scored': 109, 'empty': 1, 'failed': 0, 'score': intervals[1]}}}))
    stage(runs, 'export.py', f'--out_dir={again}')
    card = (again / 'export/huggingface/README.md').read_text()
    assert 'exact match %' in card and '51.25 [48.75, 53.75]' in card
    assert '68.50 [66.00, 71.00] on 0 to 100 by llama3, over 110 of 110 rows' in card


def test_the_tokenizer_is_tiktoken(exported):
    from tokenizers import Tokenizer
    tokenizer, tiktoken = Tokenizer.from_file(str(exported[0] / 'huggingface/tokenizer.json')), get_tokenizer()
    assert tokenizer.token_to_id('<|endoftext|>') == EOS and tokenizer.get_vocab_size() == EOS + 1
    tokenizer.encode_special_tokens = True  # as transformers does for split_special_tokens
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == tiktoken.encode_ordinary(text) and tokenizer.decode(ids) == text


def render(messages):
    """Jinja as transformers sets it up."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals['raise_exception'] = raise_exception
    return environment.from_string(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)


def test_the_chat_template_is_ours():
    for text in ['Say it.', 'Two\nlines {{ "and" }} a {% brace %}', ' <b>&amp;</b> "quoted" \'s \\n ', 'Käthe 🎉\n']:
        assert render([{'role': 'user', 'content': text}]) == format_prompt({'instruction': text})


@pytest.mark.parametrize('roles', [['system', 'user'], ['user', 'assistant', 'user'], ['assistant'], []])
def test_the_chat_template_refuses(roles):
    with pytest.raises(ValueError, match='one user message') as caught:
        render([{'role': role, 'content': 'x'} for role in roles])
    assert '\n' not in str(caught.value)


# --- PEFT


def test_peft_files(adapter, runs):
    """W + alpha / r B A, computed from PEFT's file, is the run's merged matrix."""
    from safetensors.torch import load_file
    folder, _ = adapter
    config, state = json.loads((folder / 'adapter_config.json').read_text()), load_file(folder / 'adapter_model.safetensors')
    assert config['fan_in_fan_out'] and config['r'] == 4 and len(state) == 2 * 2 * 4
    base, merged = (GPT.from_pretrained(runs / run).state_dict() for run in ('full', 'lora/gpt2-2x32-sft.pth'))
    for target in config['target_modules']:
        A, B = (state[f'base_model.model.transformer.h.1.{target}.lora_{part}.weight'] for part in 'AB')
        expected = base[f'h.1.{target}.weight'] + config['lora_alpha'] / config['r'] * B @ A
        torch.testing.assert_close(merged[f'h.1.{target}.weight'], expected, rtol=1e-6, atol=1e-6)
        assert B.abs().max() > 0


# --- GGUF


@pytest.mark.parametrize('kind, bits', [('F32', 24), ('F16', 11), ('Q8_0', 7)])
def test_gguf_file(exported, lossy, model, kind, bits):
    """Read back by the package gguf: names and shapes are those of llama.cpp, the values ours, to so many bits."""
    import gguf
    reader = gguf.GGUFReader(exported[0] / f'gguf/gpt2-2x32-{kind}.gguf')
    value = {key: field.contents() for key, field in reader.fields.items()}
    assert value['general.architecture'] == 'gpt2' and value['gpt2.context_length'] == 128 and value['gpt2.block_count'] == 2
    assert value['tokenizer.ggml.tokens'][EOS] == '<|endoftext|>' and value['tokenizer.ggml.eos_token_id'] == EOS
    assert len(value['tokenizer.ggml.merges']) == 50000 and not value['tokenizer.ggml.add_bos_token']
    assert value['tokenizer.chat_template'] == CHAT_TEMPLATE
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


def test_gguf_tokens(exported):
    """Tokens in the order of their ids, each the bytes that tiktoken has, in GPT-2's form of bytes as letters."""
    import gguf
    letters = fast_tokenizer()
    reader = gguf.GGUFReader(exported[0] / 'gguf/gpt2-2x32-F32.gguf')
    tokens, merges, types = (reader.fields[f'tokenizer.ggml.{name}'].contents() for name in ('tokens', 'merges', 'token_type'))
    for i in (0, 255, 256, 1000, 50255):
        assert letters.id_to_token(i) == tokens[i]
        assert letters.decode([i]).encode() == get_tokenizer().decode_single_token_bytes(i) or '\ufffd' in letters.decode([i])
    assert merges[0] == 'Ġ t' and types[EOS] == 3


def test_other_types_stay_and_the_modelfile_names_the_newest(exported, lossy):
    folder = exported[0] / 'gguf'
    assert sorted(path.name for path in folder.iterdir()) == ['Modelfile', *(f'gpt2-2x32-{kind}.gguf' for kind in ('F16', 'F32', 'Q8_0'))]
    lines = (folder / 'Modelfile').read_text()
    assert 'ollama create gpt2-2x32-q8_0 -f Modelfile\n' in lines and 'ollama run gpt2-2x32-q8_0' in lines
    assert '\nFROM ./gpt2-2x32-Q8_0.gguf\nTEMPLATE """' in lines and 'PARAMETER num_ctx 128\n' in lines
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER temperature 0\n' in lines
    template = lines.split('"""')[1].replace('{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }}', 'Say it.')
    assert template == format_prompt({'instruction': 'Say it.'})


# --- ONNX and torch's own programs


def feeds(model, ids, past=None, mask=None, positions=None):
    """Optimum's inputs for rows of ids."""
    ids, c = np.array(ids), model.config
    past = past or [np.zeros((len(ids), c.n_head, 0, c.n_embd // c.n_head), np.float32)] * (2 * c.n_layer)
    P, T = past[0].shape[2], ids.shape[1]
    inputs = {'input_ids': ids, 'attention_mask': np.ones((len(ids), P + T), int) if mask is None else np.array(mask),
              'position_ids': np.tile(np.arange(P, P + T), (len(ids), 1)) if positions is None else np.array(positions)}
    return inputs | {f'past_key_values.{i // 2}.{("key", "value")[i % 2]}': kv for i, kv in enumerate(past)}


def onnx_run(path):
    """-> run(feeds) -> outputs, by onnxruntime, else by onnx's own reference, operator by operator in numpy."""
    if find_spec('onnxruntime'):
        from onnxruntime import InferenceSession
        session = InferenceSession(path)
    else:
        from onnx.reference import ReferenceEvaluator
        session = ReferenceEvaluator(str(path))
    return lambda feeds: session.run(None, feeds)


def test_onnx_is_pinned_and_named_as_optimum(exported):
    import onnx
    graph = onnx.load(exported[0] / 'onnx/model.onnx')
    assert graph.ir_version == 10 and [(one.domain, one.version) for one in graph.opset_import if not one.domain] == [('', 18)]
    assert {one.domain for one in graph.opset_import} <= {'', 'pkg.onnxscript.torch_lib.common'}
    past = [f'{{}}.{layer}.{part}' for layer in range(2) for part in ('key', 'value')]
    assert [one.name for one in graph.graph.input] == ['input_ids', 'attention_mask', 'position_ids',
                                                       *(name.format('past_key_values') for name in past)]
    assert [one.name for one in graph.graph.output] == ['logits', *(name.format('present') for name in past)]
    onnx.checker.check_model(graph, full_check=True)


def test_onnx_prefill_decode_and_pads(exported, model):
    run, expected = onnx_run(exported[0] / 'onnx/model.onnx'), logits_of(model, IDS).numpy()
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
    mask, positions = [[0] * 4 + [1] * 6, [1] * 10], [[0] * 4 + [*range(6)], [*range(10)]]
    logits, *_ = run(feeds(model, [[EOS] * 4 + IDS[:6], IDS], mask=mask, positions=positions))
    np.testing.assert_allclose(logits[0, 4:], expected[:6], atol=1e-5)
    np.testing.assert_allclose(logits[1], expected, atol=1e-5)
    assert np.isfinite(logits).all()


def test_torchscript_without_this_repository(exported, model, tmp_path):
    """Both programs in a process that has torch and no file of ours, for one row and for several."""
    folder = exported[0] / 'torchscript'
    code = f"""
import sys, torch
script, program = torch.jit.load({str(folder / 'gpt2-2x32.pt')!r}), torch.export.load({str(folder / 'gpt2-2x32.pt2')!r}).module()
ids = torch.tensor([{IDS}, {IDS[::-1]}])
torch.save([f(x) for f in (script, program) for x in (ids, ids[:1], ids[:, :1])], 'logits.pt')
assert not {{'model', 'config', 'prepare', 'lora'}} & set(sys.modules)
"""
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
    with torch.no_grad():
        ids = torch.tensor([IDS, IDS[::-1]])
        expected = [model(x)[0] for x in (ids, ids[:1], ids[:, :1])] * 2
    for theirs, ours in zip(torch.load(tmp_path / 'logits.pt'), expected):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


# --- what goes wrong


@pytest.mark.parametrize('flags, said', [
    (['--to=ggml'], 'to may name huggingface, peft, gguf, onnx, torchscript'),
    (['--to=gguf', '--gguf_type=Q4_0'], 'gguf_type F32, F16, Q8_0'),
    (['--to=onnx', '--onnx_type=float16'], 'onnx_type float32, int8'),
    (['--to=peft'], 'out has no adapter.safetensors, which a run with lora_rank > 0 writes'),
    (['--out_dir=absent'], 'absent has no run: train one, or name a model by --init_from='),
    (['--init_from=absent.pth'], 'absent.pth is no checkpoint'),
])
def test_mistakes_end_in_one_line(again, runs, flags, said):
    assert said in stage(runs, 'export.py', f'--out_dir={again}', *flags, code=2).stderr
    assert not (again / 'export').exists() and not (runs / 'absent').exists()


def test_a_missing_package_is_named(again, runs):
    """Before anything is written: gguf is hidden from the process."""
    hide = ('import importlib.util\nreal = importlib.util.find_spec\n'
            'importlib.util.find_spec = lambda name, *rest: None if name == "gguf" else real(name, *rest)\n')
    process = stage(runs, 'export.py', f'--out_dir={again}', '--to=huggingface,gguf', code=2, first=hide)
    assert "to='huggingface,gguf' needs packages: pip install gguf" in process.stderr
    assert not (again / 'export').exists()


def test_a_missing_consumer_is_named(again, runs):
    process = stage(runs, 'export.py', f'--out_dir={again}', first='import sys; sys.modules["transformers"] = None')
    assert 'written, not verified: huggingface needs a package: pip install transformers' in process.stdout
    assert (again / 'export/huggingface/model.safetensors').exists()


def test_widths(run, tmp_path):
    """48 channels are no whole 32s: Q8_0 is refused, with nothing left behind."""
    folder = tmp_path / 'odd'
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(GPT(GPTConfig(n_layer=1, n_head=3, n_embd=48, block_size=64)).state_dict(), folder / 'odd-sft.pth')
    (folder / 'odd-sft.json').write_text(json.dumps({'model': {'n_layer': 1, 'n_head': 3, 'n_embd': 48, 'block_size': 64, 'vocab_size': EOS + 1}}))
    process = run('export.py', '--init_from=odd', '--out_dir=out', '--to=gguf', '--gguf_type=Q8_0', code=2)
    assert 'Q8_0 an n_embd of whole 32s' in process.stderr
    assert not list((tmp_path / 'out/export').iterdir())


def test_another_vocabulary(run, tmp_path):
    """OpenAI's form, 257 ids: weights without a tokenizer, which would not fit."""
    run('export.py', f'--init_from={ROOT}/tests/fixtures/openai-tiny', '--out_dir=out')
    files = {path.name for path in (tmp_path / 'out/export/huggingface').iterdir()}
    assert files == {'README.md', 'config.json', 'generation_config.json', 'model.safetensors'}
    again, first = (GPT.from_pretrained(where).eval() for where in (tmp_path / 'out/export/huggingface', ROOT / 'tests/fixtures/openai-tiny'))
    assert torch.equal(logits_of(again, [1, 2, 256]), logits_of(first, [1, 2, 256]))


@pytest.mark.parametrize('name', ['huggingface', 'gguf', 'torchscript'])
def test_a_full_disk(runs, tmp_path, name):
    """No file may pass 4,000 bytes: one line, and the earlier export is kept."""
    out = tmp_path / 'out'
    shutil.copytree(runs / 'lora', out, ignore=shutil.ignore_patterns('ckpt.pt', 'export'))
    (out / 'export' / name).mkdir(parents=True)
    (out / 'export' / name / 'before').write_text('')
    process = stage(runs, 'export.py', f'--out_dir={out}', f'--to={name}', code=2,
                    first='import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))')
    assert f'cannot write {out}/export/{name}' in process.stderr
    assert [path.name for path in (out / 'export').iterdir()] == [name] and (out / 'export' / name / 'before').exists()


def test_a_wrong_export_is_found(again, runs):
    """A consumer whose logits are off by 0.001 at one position: exit 1, the folder set aside, the earlier export kept."""
    (again / 'export/torchscript').mkdir(parents=True)
    wrong_load = """
import torch
load = torch.jit.load
def wrong(path):
    program = load(path)
    def logits(ids):
        found = program(ids)
        found[0, 3, 1000] += 0.001
        return found
    return logits
torch.jit.load = wrong
"""
    process = stage(runs, 'export.py', f'--out_dir={again}', '--to=torchscript', code=1, first=wrong_load)
    assert process.stderr.startswith('export.py: ') and 'torchscript.failed does not compute what model.py does' in process.stderr
    assert process.stderr.count('\n') == 1 and 'largest difference of logits 1.0e-03' in process.stdout
    assert sorted(path.name for path in (again / 'export').iterdir()) == ['torchscript', 'torchscript.failed']


# --- with the programs that read: make interop


CONSUMERS = ['transformers', 'peft', 'llama_cpp', 'onnxruntime']


@needs(*CONSUMERS)
def test_all_are_verified(exported, adapter, lossy):
    assert exported[1].count('greedy ids of 3 of 3 prompts equal') == 5 and 'not verified' not in exported[1]
    assert adapter[1].count('greedy ids of 3 of 3 prompts equal') == 1
    for kind in ('F16', 'Q8_0', 'int8'):
        assert '% of greedy ids equal, over 6 test rows' in lossy[kind]
        assert 'in fp32: exact match' in lossy[kind] and 'exported: exact match' in lossy[kind]


@needs('transformers')
def test_transformers_takes_the_folder(exported, model):
    """Model, tokenizer, chat template and pipeline, with no further argument; a batch, padded by its own settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    folder = exported[0] / 'huggingface'
    net, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(net(input_ids=torch.tensor([IDS])).logits[0], logits_of(model, IDS), rtol=0, atol=1e-5)
    for text in TEXTS[::7]:
        assert tokenizer(text)['input_ids'] == get_tokenizer().encode_ordinary(text)
    row = {'instruction': 'Write the word cat.'}
    messages = [{'role': 'user', 'content': row['instruction']}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == format_prompt(row)
    with pytest.raises(Exception, match='one user message'):
        tokenizer.apply_chat_template([{'role': 'system', 'content': 'x'}, *messages], tokenize=False)
    answer = get_tokenizer().decode(model.generate([encode_prompt(row)], 8)[0])
    generate = pipeline('text-generation', str(folder))
    assert generate(messages)[0]['generated_text'][-1]['content'] == answer
    prompts = [format_prompt(row) for row in ROWS[:3]]
    expected = [get_tokenizer().decode(ids) for ids in model.generate([encode_prompt(row) for row in ROWS[:3]], 8)]
    batch = tokenizer(prompts, return_tensors='pt', padding=True)
    new = net.generate(**batch)[:, batch['input_ids'].size(1):]
    assert tokenizer.batch_decode(new, skip_special_tokens=True) == expected


@needs('peft')
def test_peft_takes_the_adapter(exported, adapter, runs):
    """Upon the exported base, the logits of our adapter to 1e-5."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(exported[0] / 'huggingface')
    with torch.no_grad():
        plain = base(input_ids=torch.tensor([IDS])).logits[0]
        theirs = PeftModel.from_pretrained(base, adapter[0])(input_ids=torch.tensor([IDS])).logits[0]
    ours = GPT.from_pretrained(runs / 'full').eval()
    load_adapter(ours, runs / 'lora/adapter.safetensors')
    torch.testing.assert_close(theirs, logits_of(ours, IDS), rtol=0, atol=1e-5)
    assert (theirs - plain).abs().max() > 1e-4


@needs('peft')
def test_peft_takes_a_strong_adapter(tmp_path):
    """Other matrices, rank and alpha, and values far from zero."""
    from export import read_peft
    from lora import save_peft
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)).eval()
    torch.save(model.state_dict(), tmp_path / 'base-sft.pth')
    (tmp_path / 'base-sft.json').write_text(json.dumps({'model': vars(model.config)}))
    add_lora(model, 8, 24.0, targets='attn.c_proj, mlp.c_fc')
    for name, p in model.named_parameters():
        if name.endswith(('.A', '.B')):
            torch.nn.init.normal_(p, std=0.1)
    save_peft(model, tmp_path, 'somewhere')
    [(_, step)] = read_peft(tmp_path, tmp_path / 'base-sft.pth', '')
    with torch.no_grad():
        torch.testing.assert_close(step(IDS, None)[0], logits_of(model, IDS), rtol=0, atol=1e-5)


@needs('llama_cpp')
def test_llama_cpp_takes_the_file(exported, model):
    """Its tokenizer, and a chat through the template that the file holds."""
    from llama_cpp import Llama
    llama = Llama(str(exported[0] / 'gguf/gpt2-2x32-F32.gguf'), n_ctx=128, verbose=False)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == get_tokenizer().encode_ordinary(text), text
    reply = llama.create_chat_completion([{'role': 'user', 'content': 'Write the word cat.'}], temperature=0, max_tokens=8)
    answer = get_tokenizer().decode(model.generate([encode_prompt({'instruction': 'Write the word cat.'})], 8)[0])
    assert reply['choices'][0]['message']['content'].strip() == answer.strip()
    with pytest.raises(Exception, match='one user message'):
        llama.create_chat_completion([{'role': 'system', 'content': 'x'}, {'role': 'user', 'content': 'x'}])


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
    """The demo's model, trained for less long: its answers to 300 test prompts are equal id by id in all programs."""
    folder = tmp_path_factory.mktemp('demo')
    shutil.copytree(ROOT / 'data', folder / 'data', ignore=shutil.ignore_patterns('demo'))
    config = ROOT / 'config/demo.py'
    stage(folder, 'prepare.py', config)
    stage(folder, 'train.py', config, '--max_steps=800', timeout=1200, env={'OMP_NUM_THREADS': '2'})
    printed = stage(folder, 'export.py', config, '--to=huggingface,gguf,onnx,torchscript').stdout
    assert printed.count('greedy ids of 3 of 3 prompts equal') == 5
    model = GPT.from_pretrained(folder / 'out/demo/gpt2-3x128-sft.pth').eval()
    rows = json.loads((folder / 'data/demo/test.json').read_text())['rows']
    prompts = [encode_prompt(row) for row in rows]
    answers = model.generate(prompts, 24)
    assert len(prompts) == 900 and sum(map(len, answers)) > 900
    for name in ('huggingface', 'gguf', 'onnx', 'torchscript'):
        for one in open_exported(name, folder / 'out/demo/export' / name, model.config, '', ''):
            assert one.generate(prompts[:300], 24) == answers[:300], name
    # and the exported folder is a model for sample.py, too
    stage(folder, 'sample.py', config, '--init_from=out/demo/export/huggingface', '--out_dir=out/again')
    again = json.loads((folder / 'out/again/instruction-data-with-response.json').read_text())
    assert [row['model_response'] for row in again] == [get_tokenizer().decode(ids).strip() for ids in answers]
