"""Every way of loading a GPT: equal to what wrote the files, and a single line for what is wrong with them."""
import json
import math
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import model as model_file
from model import GPT, GPTConfig, ModelError, fingerprint, read_index, read_openai

import google_crc32c
import numpy as np
import pytest
import torch
from torch.nn import functional as F

TINY = Path(__file__).parent / 'fixtures' / 'openai-tiny'  # written by TensorFlow from OpenAI's own code, with its logits
SHAPE = {'n_vocab': 64, 'n_ctx': 16, 'n_embd': 8, 'n_head': 2, 'n_layer': 13}

# --- a writer of bundles, from the formats' documents


def number(n):
    """A varint."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + number(n >> 7)


def crc_of(data):
    crc = google_crc32c.value(data)
    return struct.pack('<I', ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)


def field(key, value):
    """A protobuf field: a number, or bytes. Zeros are left out."""
    if isinstance(value, bytes):
        return number(key << 3 | 2) + number(len(value)) + value
    return number(key << 3) + number(value) if value else b''


def table(entries, per_block, kind):
    """[(key, value)] in the order of keys -> a LevelDB table of blocks of per_block entries, their type byte being kind."""
    out = b''
    handles = []

    def add(entries):
        nonlocal out
        block = b''
        restarts = []
        last = b''
        for i, (key, value) in enumerate(entries):
            shared = 0 if i % 16 == 0 else len(os.path.commonprefix([last, key]))
            restarts += [len(block)] if i % 16 == 0 else []
            block += number(shared) + number(len(key) - shared) + number(len(value)) + key[shared:] + value
            last = key
        restarts = restarts or [0]
        block += struct.pack(f'<{len(restarts) + 1}I', *restarts, len(restarts))
        handle = number(len(out)) + number(len(block))
        out += block + bytes([kind]) + crc_of(block + bytes([kind]))
        return handle

    for i in range(0, len(entries), per_block):
        part = entries[i:i + per_block]
        handles.append((part[-1][0] + b'~', add(part)))  # a separator, not a name
    footer = add([]) + add(handles)
    return out + footer.ljust(40, b'\0') + struct.pack('<Q', 0xDB4775248B80FB57)


def write_bundle(prefix, tensors, per_block=100, shards=1, gap=0, kind=0, header=None, extra=b'', dtype=1, more=0):
    """{variable: array} -> prefix.index and its data files; gap: bytes before each tensor; more: bytes its size is off."""
    entries = []
    files = [open(f'{prefix}.data-{i:05d}-of-{shards:05d}', 'wb') for i in range(shards)]
    for i, (name, array) in enumerate(reversed(tensors.items())):  # offsets are not in the order of the keys
        file = files[i % shards]
        data = np.ascontiguousarray(array, '<f4').tobytes()
        file.write(b'x' * gap)
        shape = b''.join(field(2, field(1, size)) for size in array.shape)
        entry = field(1, dtype) + field(2, shape) + field(3, i % shards) + field(4, file.tell())
        entry += field(5, len(data) + more)
        entries.append((name.encode(), entry + number(6 << 3 | 5) + crc_of(data) + extra))
        file.write(data)
    for file in files:
        file.close()
    header = field(1, shards) + field(3, field(1, 1)) if header is None else header
    Path(f'{prefix}.index').write_bytes(table([(b'', header), *sorted(entries)], per_block, kind))


def openai_tensors(shape, rng):
    """Random {variable: array} in OpenAI's names and shapes."""
    C = shape['n_embd']
    shapes = {}
    for i in range(shape['n_layer']):
        layers = {'attn/c_attn': (C, 3 * C), 'attn/c_proj': (C, C), 'mlp/c_fc': (C, 4 * C), 'mlp/c_proj': (4 * C, C)}
        for name, (width, to) in layers.items():
            shapes |= {f'model/h{i}/{name}/w': (1, width, to), f'model/h{i}/{name}/b': (to,)}
        shapes |= {f'model/h{i}/{ln}/{part}': (C,) for ln in ('ln_1', 'ln_2') for part in 'gb'}
    shapes |= {'model/ln_f/g': (C,), 'model/ln_f/b': (C,)}
    shapes |= {'model/wte': (shape['n_vocab'], C), 'model/wpe': (shape['n_ctx'], C)}
    return {name: rng.standard_normal(size, dtype=np.float32) for name, size in shapes.items()}


def write_openai(folder, shape=SHAPE, tensors=None, **options):
    folder.mkdir(exist_ok=True)
    (folder / 'hparams.json').write_text(json.dumps(shape))
    tensors = openai_tensors(shape, np.random.default_rng(1)) if tensors is None else tensors
    write_bundle(folder / 'model.ckpt', tensors, **options)
    return tensors


def same(a, b):
    """Whether two models have equal weights in the same names."""
    ours = a.state_dict()
    theirs = b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def fault_of(where, **settings):
    """The message of the ModelError; one line, always."""
    with pytest.raises(ModelError) as error:
        GPT.from_pretrained(where, **settings)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.fixture
def tiny(tmp_path):
    """A copy of the reference checkpoint that a test may damage."""
    folder = tmp_path / 'tiny'
    shutil.copytree(TINY, folder)
    return folder


@pytest.fixture(scope='module')
def reference():
    return GPT.from_pretrained(TINY).eval()


# --- equal to OpenAI's own code


@torch.no_grad()
def test_logits_are_openais(reference, monkeypatch):
    expected = np.load(TINY / 'expected.npz')
    for tokens, result in ('tokens', 'logits'), ('long_tokens', 'long_logits_tail'):
        ids = torch.from_numpy(expected[tokens]).long()
        logits = torch.from_numpy(expected[result])
        torch.testing.assert_close(reference(ids), logits, atol=5e-5, rtol=0)
    # the tolerance is tight enough to see another GELU
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(model_file.F, 'gelu', lambda x, approximate: gelu(x))
    assert (reference(ids) - logits).abs().max() > 1e-4


def test_greedy_ids_are_openais(reference):
    expected = np.load(TINY / 'expected.npz')
    answers = [reference.generate(ids, 20, eos=-1) for ids in expected['tokens'].tolist()]
    assert answers == expected['greedy'].tolist()


def test_loads_in_fp32_and_trains(reference):
    model = GPT.from_pretrained(TINY, dropout=0.1)
    assert model.training and model.config.dropout == 0.1 and same(model, reference)
    assert all(p.dtype == torch.float32 and p.requires_grad and p.is_contiguous() for p in model.parameters())
    model(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)).backward()


def test_tied_and_counted(tmp_path):
    with torch.device('meta'):
        assert sum(p.numel() for p in GPT(GPTConfig(n_layer=24, n_head=16, n_embd=1024)).parameters()) == 354_823_168
    model = GPT.from_pretrained(TINY)
    assert not any('lm_head' in name for name in model.state_dict())
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    size = 4 * sum(p.numel() for p in model.parameters())
    assert size == (TINY / 'model.ckpt.data-00000-of-00001').stat().st_size
    assert (tmp_path / 'x.pth').stat().st_size < size + 4 * model.wte.weight.numel()  # wte is in it once; the rest is names


# --- OpenAI's form


@pytest.mark.parametrize('options', [
    {}, {'per_block': 3}, {'shards': 3}, {'gap': 1}, {'per_block': 1, 'shards': 2, 'gap': 7}])
def test_blocks_shards_offsets_and_layers(tmp_path, options):
    tensors = write_openai(tmp_path / 'x', **options)
    model = GPT.from_pretrained(tmp_path / 'x')
    assert model.config == GPTConfig(16, 64, 13, 2, 8)
    for i, block in enumerate(model.h):  # h10 is the eleventh
        for ours, theirs in ('attn.c_attn', 'attn/c_attn'), ('attn.c_proj', 'attn/c_proj'), ('mlp.c_proj', 'mlp/c_proj'):
            # (in, out) there, (out, in) here, the square one too
            assert np.array_equal(block.get_submodule(ours).weight.detach(), tensors[f'model/h{i}/{theirs}/w'][0].T)
        assert np.array_equal(block.ln_2.weight.detach(), tensors[f'model/h{i}/ln_2/g'])
        assert np.array_equal(block.mlp.c_fc.bias.detach(), tensors[f'model/h{i}/mlp/c_fc/b'])
    assert np.array_equal(model.wte.weight.detach(), tensors['model/wte'])
    assert np.array_equal(model.wpe.weight.detach(), tensors['model/wpe'])
    assert same(GPT.from_pretrained(tmp_path / 'x' / 'model.ckpt.index'), model)


def test_empty_dimension(tmp_path):
    tensors = write_openai(tmp_path / 'x', tensors={'model/wte': np.ones((2, 3)), 'model/none': np.ones((0, 3))})
    arrays = read_openai(tmp_path / 'x' / 'model.ckpt.index')
    assert arrays['model/none'].shape == (0, 3) and np.array_equal(arrays['model/wte'], tensors['model/wte'])


@pytest.mark.parametrize('options, fault', [
    ({'kind': 1}, 'is compressed'),
    ({'dtype': 9}, 'is not of float32'),
    ({'header': b''}, 'it is not the index of a checkpoint'),
    ({'header': field(1, 2)}, 'model.ckpt.data-00000-of-00002'),
    ({'more': 4}, 'model.ckpt.data-00000-of-00001'),
    ({'extra': number(9 << 3 | 3)}, 'it is not the index of a checkpoint'),
])
def test_refused_bundles(tmp_path, options, fault):
    write_openai(tmp_path / 'x', **options)
    assert fault in fault_of(tmp_path / 'x')


def test_every_flipped_byte_of_an_index_is_seen(tiny):
    index = tiny / 'model.ckpt.index'
    good = index.read_bytes()
    entries = read_index(index)
    for i in range(len(good)):
        index.write_bytes(good[:i] + bytes([good[i] ^ 16]) + good[i + 1:])
        try:
            assert read_index(index) == entries, i  # what nobody reads: the metaindex, the footer's padding
        except ModelError as error:
            assert str(index) in str(error)
    for size in range(0, len(good), 7):
        index.write_bytes(good[:size])
        with pytest.raises(ModelError, match='cannot read'):
            read_index(index)


def test_flipped_bytes_of_data_are_named(tiny):
    data = tiny / 'model.ckpt.data-00000-of-00001'
    good = data.read_bytes()
    for i in (0, 17, len(good) // 2, len(good) - 1):
        data.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1:])
        fault = fault_of(tiny)
        assert f'cannot read {data}: model/' in fault and 'its checksum differs' in fault
    assert data.exists()  # a folder of the user's is not touched
    data.write_bytes(good[:-1])
    assert f'cannot read {data}: mmap length is greater than file size' in fault_of(tiny)
    data.write_bytes(b'')
    assert 'cannot read ' + str(data) in fault_of(tiny)
    data.unlink()
    assert 'cannot read ' + str(data) in fault_of(tiny)


@pytest.mark.parametrize('text', ['<?xml version="1.0"?>\n<Error/>', '[]', '{"n_ctx": 4}', '{"n_vocab": "a"}', ''])
def test_faulty_hparams(tiny, text):
    (tiny / 'hparams.json').write_text(text)
    assert 'hparams.json' in fault_of(tiny)
    (tiny / 'hparams.json').unlink()
    assert 'hparams.json' in fault_of(tiny)


def test_gap_extra_and_wrong_shape_are_named(tmp_path):
    tensors = openai_tensors(SHAPE, np.random.default_rng(1))
    write_openai(tmp_path / 'a', tensors={k: v for k, v in tensors.items() if k != 'model/h10/ln_1/g'})
    fault = fault_of(tmp_path / 'a')
    assert 'it does not fit a GPT-2 of 13 layers, width 8' in fault and 'Missing key(s) in state_dict: "h.10.ln_1.weight"' in fault
    write_openai(tmp_path / 'b', tensors=tensors | {'model/h13/ln_1/g': np.ones(8)})
    assert 'Unexpected key(s) in state_dict: "h.13.ln_1.weight"' in fault_of(tmp_path / 'b')
    write_openai(tmp_path / 'c', tensors=tensors | {'model/h0/mlp/c_fc/w': np.ones((1, 8, 31))})
    assert 'size mismatch for h.0.mlp.c_fc.weight' in fault_of(tmp_path / 'c')
    write_openai(tmp_path / 'd', SHAPE | {'n_head': 3}, tensors)
    assert '3 heads in a width of 8' in fault_of(tmp_path / 'd')


def test_absent_libraries_are_named(tmp_path, reference, monkeypatch):
    write_safetensors(tmp_path, reference)
    for where, library in (TINY, 'google_crc32c'), (tmp_path, 'safetensors.torch'):
        with pytest.raises(ModuleNotFoundError) as error:  # which config prints in one line
            monkeypatch.setitem(sys.modules, library, None)
            GPT.from_pretrained(where)
        assert library in str(error.value)


# --- Hugging Face's form


def huggingface_tensors(model, prefix='', dtype=torch.float32):
    """{name: tensor} as transformers saves a GPT-2: Conv1D weights (in, out)."""
    return {prefix + name: (tensor.t() if name.endswith('weight') and '.c_' in name else tensor).to(dtype).contiguous()
            for name, tensor in model.state_dict().items()}


def write_safetensors(folder, model, tensors=None, name='model.safetensors', config=()):
    from safetensors.torch import save_file
    c = model.config
    save_file(tensors or huggingface_tensors(model), folder / name, {'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps({
        'model_type': 'gpt2', 'n_positions': c.block_size, 'n_ctx': c.block_size, 'vocab_size': c.vocab_size,
        'n_embd': c.n_embd, 'n_head': c.n_head, 'n_layer': c.n_layer, 'activation_function': 'gelu_new', **dict(config)}))


@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_safetensors(tmp_path, reference, prefix):
    tensors = huggingface_tensors(reference, prefix)
    tensors[prefix + 'h.0.attn.bias'] = torch.ones(1, 1, 64, 64).tril().bool()
    tensors[prefix + 'h.1.attn.masked_bias'] = torch.tensor(-1e4)
    tensors['lm_head.weight'] = reference.wte.weight.detach().clone()
    write_safetensors(tmp_path, reference, tensors)
    assert same(GPT.from_pretrained(tmp_path), reference)
    assert same(GPT.from_pretrained(str(tmp_path / 'model.safetensors')), reference)
    assert GPT.from_pretrained(tmp_path).config == reference.config
    tensors['lm_head.weight'] = tensors['lm_head.weight'] + 1
    write_safetensors(tmp_path, reference, tensors)
    assert 'its output layer differs from its token embedding' in fault_of(tmp_path)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_loads_as_fp32(tmp_path, reference, dtype):
    write_safetensors(tmp_path, reference, huggingface_tensors(reference, dtype=dtype))
    model = GPT.from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, reference.state_dict()[name].to(dtype).float())


def test_sharded_safetensors(tmp_path, reference):
    tensors = list(huggingface_tensors(reference, 'transformer.').items())
    shards = {}
    for i in range(3):
        name = f'model-{i + 1:05d}-of-00003.safetensors'
        write_safetensors(tmp_path, reference, dict(tensors[i::3]), name)
        shards |= dict.fromkeys(dict(tensors[i::3]), name)
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': shards}))
    assert same(GPT.from_pretrained(tmp_path), reference)
    (tmp_path / name).unlink()
    assert 'cannot read ' + str(tmp_path / name) in fault_of(tmp_path)
    for index in '{"weight_map": []}', '{"weight_map": {"wte.weight": 3}}', '{"weight_map": {}}', '{}':
        (tmp_path / 'model.safetensors.index.json').write_text(index)
        assert 'model.safetensors.index.json' in fault_of(tmp_path)


@pytest.fixture(scope='module')
def of_openais_width():
    """One layer of GPT-2 Small's width, which has 12 heads wherever the number is not told."""
    torch.manual_seed(0)
    return GPT(GPTConfig(32, 50, 1, 12, 768)).eval()


def test_safetensors_without_a_config_of_openais_width(tmp_path, of_openais_width):
    write_safetensors(tmp_path, of_openais_width)
    (tmp_path / 'config.json').unlink()
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == of_openais_width.config and same(loaded, of_openais_width)


@pytest.mark.parametrize('form', ['pth', 'safetensors'])
def test_the_heads_of_another_width_are_not_guessed(tmp_path, form):
    """Four heads of 32 would be taken for two of 64, and answer with other words."""
    model = GPT(GPTConfig(32, 50, 2, 4, 128))
    if form == 'pth':
        torch.save(model.state_dict(), tmp_path / 'x.pth')
        assert 'a width of 128 has no usual number of heads' in fault_of(tmp_path / 'x.pth')
        (tmp_path / 'x.json').write_text(json.dumps({'model': vars(model.config)}))
        assert same(GPT.from_pretrained(tmp_path / 'x.pth'), model)
    else:
        write_safetensors(tmp_path, model)
        config = (tmp_path / 'config.json').read_text()
        (tmp_path / 'config.json').unlink()
        assert 'a width of 128 has no usual number of heads' in fault_of(tmp_path)
        (tmp_path / 'config.json').write_text(config)
        assert same(GPT.from_pretrained(tmp_path), model)


def test_where_to_tell_the_heads_of_safetensors(tmp_path):
    write_safetensors(tmp_path, GPT(GPTConfig(32, 50, 2, 4, 128)))
    (tmp_path / 'config.json').unlink()
    assert f'into {tmp_path / "config.json"}' in fault_of(tmp_path)


def as_module(tensors):
    """A module tree with these parameters, {dotted name: tensor}."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parts, last = name.split('.')
        module = root
        for part in parts:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(last, tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor))
    return root


def test_the_tied_pair_of_which_safetensors_keeps_the_output_layer(tmp_path, reference):
    """save_model of safetensors 0.8 writes a shared tensor under one of its names, here not that of the embedding."""
    from safetensors import safe_open
    from safetensors.torch import save_model
    tied = torch.nn.Parameter(reference.wte.weight.detach().clone())
    tensors = huggingface_tensors(reference, 'transformer.') | {'transformer.wte.weight': tied, 'lm_head.weight': tied}
    write_safetensors(tmp_path, reference)
    save_model(as_module(tensors), str(tmp_path / 'model.safetensors'))
    with safe_open(tmp_path / 'model.safetensors', 'pt') as file:
        assert 'lm_head.weight' in file.keys() and 'transformer.wte.weight' not in file.keys()
    assert same(GPT.from_pretrained(tmp_path), reference)


def test_faulty_safetensors(tmp_path, reference):
    tensors = huggingface_tensors(reference)
    file = tmp_path / 'model.safetensors'
    write_safetensors(tmp_path, reference, tensors | {'h.0.ln_1.bias': torch.zeros(31)})
    assert 'size mismatch for h.0.ln_1.bias' in fault_of(tmp_path) and 'torch.Size([31])' in fault_of(tmp_path)
    write_safetensors(tmp_path, reference, tensors | {'h.0.ln_1.bias': torch.zeros(32, dtype=torch.int64)})
    assert 'Missing key(s) in state_dict: "h.0.ln_1.bias"' in fault_of(tmp_path)  # whole numbers are not weights
    write_safetensors(tmp_path, reference, tensors | {'score.weight': torch.zeros(2, 3)})
    assert 'Unexpected key(s) in state_dict: "score.weight"' in fault_of(tmp_path)
    del tensors['wpe.weight']
    write_safetensors(tmp_path, reference, tensors)
    assert 'Missing key(s) in state_dict: "wpe.weight"' in fault_of(tmp_path)
    write_safetensors(tmp_path, reference, config={'activation_function': 'gelu'})
    assert "activation_function is 'gelu'; this GPT-2 has 'gelu_new'" in fault_of(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    assert 'cannot read ' + str(file) in fault_of(file)
    file.write_text('<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>')
    assert 'cannot read ' + str(file) in fault_of(file)


@torch.no_grad()
def test_equals_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=99, n_positions=40, n_embd=48, n_layer=11, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config)
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.05)  # biases and norms too
    theirs.eval().save_pretrained(tmp_path)
    ids = torch.randint(99, (3, 40))
    torch.testing.assert_close(GPT.from_pretrained(tmp_path).eval()(ids), theirs(ids).logits, atol=5e-5, rtol=0)


# --- our own


def test_own_checkpoints(tmp_path, reference):
    fields = vars(reference.config) | {'dropout': 0.3}
    ckpt = {'model': reference.state_dict(), 'model_config': fields, 'step': 3, 'rng': torch.get_rng_state()}
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    model = GPT.from_pretrained(tmp_path)
    assert same(model, reference) and model.config == reference.config  # dropout is the caller's
    torch.save({name: tensor + 1 for name, tensor in reference.state_dict().items()}, tmp_path / 'tiny-sft.pth')
    (tmp_path / 'tiny-sft.json').write_text(json.dumps({'model': fields, 'config': {}}))
    (tmp_path / 'model.safetensors').write_text('not the one')
    os.utime(tmp_path / 'tiny-sft.pth', (1, 1))
    assert not same(GPT.from_pretrained(tmp_path), reference)  # with keep_best the older file is the better model
    assert same(GPT.from_pretrained(tmp_path / 'ckpt.pt'), reference)
    assert torch.equal(GPT.from_pretrained(tmp_path / 'tiny-sft.pth').wpe.weight, reference.wpe.weight + 1)
    torch.save(reference.state_dict(), tmp_path / 'other-sft.pth')
    (tmp_path / 'other-sft.json').write_text(json.dumps({'model': fields, 'config': {}}))
    assert same(GPT.from_pretrained(tmp_path), reference)  # the newest


def test_own_checkpoint_of_openais_width_without_its_json(tmp_path, of_openais_width):
    torch.save(of_openais_width.state_dict(), tmp_path / 'x.pth')
    loaded = GPT.from_pretrained(tmp_path / 'x.pth')
    assert loaded.config == of_openais_width.config and same(loaded, of_openais_width)


def test_a_vocabulary_that_is_longer_than_asked_for_is_cut(tmp_path, reference):
    write_safetensors(tmp_path, reference)
    n_tokens = reference.config.vocab_size
    cut = GPT.from_pretrained(tmp_path, vocab_size=n_tokens - 3)
    assert cut.config.vocab_size == n_tokens - 3 and torch.equal(cut.wte.weight, reference.wte.weight[:-3])
    assert same(GPT.from_pretrained(tmp_path, vocab_size=n_tokens + 3), reference)


class Trap:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ('sprung',)


def test_faulty_own_checkpoints(tmp_path, reference, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), 'x.pth')
    assert 'cannot read x.pth' in fault_of('x.pth') and not Path('sprung').exists()
    tensors = reference.state_dict()
    for saved in ([], {}, {'a': 1}, {'a': torch.ones(1)}, {'model': tensors, 'model_config': [1]},
                  {'model': tensors, 'model_config': {'n_layer': 2}}):
        torch.save(saved, 'x.pth')
        assert 'cannot read x.pth' in fault_of('x.pth')
    torch.save({name.replace('h.1', 'h.7'): tensors[name] for name in tensors}, 'x.pth')
    Path('x.json').write_text(json.dumps({'model': vars(reference.config)}))
    assert 'Missing key(s) in state_dict: "h.1.ln_1.weight"' in fault_of('x.pth') and 'a GPT-2 of 2 layers' in fault_of('x.pth')
    torch.save({'h.0.attn.c_attn.A': torch.ones(2, 3)}, 'x.pth')
    assert 'x.pth' in fault_of('x.pth') and 'where a run trained LoRA, load the *-sft.pth beside this file' in fault_of('x.pth')
    Path('x.json').write_text(Path('x.json').read_text()[:-9])
    torch.save(tensors, 'x.pth')
    assert 'cannot read x.json' in fault_of('x.pth')
    Path('x.pth').write_bytes(b'cut')
    assert 'cannot read x.pth' in fault_of('x.pth')


@pytest.mark.parametrize('wrap', [
    lambda state: {'model': state, 'iter': 7},
    lambda state: {'state_dict': {f'model.transformer.{name}': tensor for name, tensor in state.items()}, 'epoch': 3},
    lambda state: {f'module.{name}': tensor for name, tensor in state.items()},
    lambda state: {f'module._orig_mod.{name}': tensor for name, tensor in state.items()},
    lambda state: state | {'h.0.attn.bias': torch.ones(1, 1, 32, 32).tril().bool(), 'steps': 7},
    lambda state: {f'transformer.{name}': model_file.transpose_conv1d(name, tensor) for name, tensor in state.items()},
    lambda state: {name: tensor.double() for name, tensor in state.items()},
], ids=['model', 'Lightning', 'DistributedDataParallel', 'torch.compile', 'masks', 'Hugging Face', 'fp64'])
def test_state_dicts_as_others_save_them(tmp_path, of_openais_width, wrap):
    torch.save(wrap(of_openais_width.state_dict()), tmp_path / 'x.pth')
    assert same(GPT.from_pretrained(tmp_path / 'x.pth'), of_openais_width)


def test_a_file_of_before_torch_1_6(tmp_path, of_openais_width):
    torch.save(of_openais_width.state_dict(), tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    assert same(GPT.from_pretrained(tmp_path / 'x.pth'), of_openais_width)


@pytest.mark.parametrize('data', [b'', b'<html>', b'PK', None])
def test_damaged_files_end_in_one_line(tmp_path, of_openais_width, data):
    torch.save(of_openais_width.state_dict(), tmp_path / 'x.pth')
    whole = (tmp_path / 'x.pth').read_bytes()
    (tmp_path / 'x.pth').write_bytes(whole[:-30] if data is None else data)
    assert 'x.pth: it is damaged, or holds Python objects' in fault_of(tmp_path / 'x.pth')


def test_a_module_is_not_unpickled(tmp_path, of_openais_width):
    torch.save(of_openais_width, tmp_path / 'x.pth')
    assert 'holds Python objects instead of a state dict' in fault_of(tmp_path / 'x.pth')


def test_a_link_to_nothing_is_not_a_checkpoint(tmp_path, of_openais_width):
    (tmp_path / 'gone-sft.pth').symlink_to(tmp_path / 'nothing')
    (tmp_path / 'ckpt.pt').mkdir()
    write_safetensors(tmp_path, of_openais_width)
    assert same(GPT.from_pretrained(tmp_path), of_openais_width)


def test_what_is_not_a_model_is_told_what_is(tmp_path):
    for where in ('gpt2-huge', tmp_path / 'nothing', tmp_path):
        assert 'a model is one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the path to one' in fault_of(where)
    (tmp_path / 'x.txt').write_text('x')
    assert 'x.txt is not a *.pth' in fault_of(tmp_path / 'x.txt')


def test_a_fingerprint_tells_weights_from_others(reference):
    weights = dict(reference.named_parameters())
    mine = fingerprint(weights)
    assert len(mine) == 64
    assert fingerprint({name: weights[name].detach().clone() for name in reversed(weights)}) == mine
    square = weights['h.0.attn.c_proj.weight']
    names = list(weights)
    for other in (
            weights | {'h.0.attn.c_proj.weight': square.t()},
            weights | {'h.0.attn.c_proj.weight': square.reshape(16, 64)},
            {name.replace('h.1', 'h.2'): weights[name] for name in names},
            {name: weights[name] for name in names[1:]}):
        assert fingerprint(other) != mine
    # a step of training changes it, however small
    model = GPT.from_pretrained(TINY)
    ids = torch.tensor([[1, 2, 3]])
    model(ids, ids).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-6).step()
    assert fingerprint(dict(model.named_parameters())) != mine


def test_a_fingerprint_meets_all_columns_of_a_large_matrix():
    """It takes every so many values; LoRA of a single column would change none of them if their columns were the same."""
    matrix = torch.zeros(1024, 1024)
    mine = fingerprint({'w': matrix})
    for column in 0, 1, 511, 1023:
        changed = matrix.clone()
        changed[:, column] = 1.0
        assert fingerprint({'w': changed}) != mine
    for row in 0, 7, 1023:
        changed = matrix.clone()
        changed[row] = 1.0
        assert fingerprint({'w': changed}) != mine


# --- other people's forms


def plain_logits(get, ids, n_layer, n_head, approximate):
    """GPT-2's forward from its formulas, for one row of ids. get(kind, layer) -> a weight (out, in) and a bias, or None."""
    def linear(x, kind, layer=None):
        weight, bias = get(kind, layer)
        return x @ weight.T + (0 if bias is None else bias)

    def norm(x, kind, layer=None):
        scale, shift = get(kind, layer)
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(x.var(dim=-1, keepdim=True, unbiased=False) + 1e-5) * scale + (0 if shift is None else shift)

    T = len(ids)
    x = get('tokens')[0][ids] + get('positions')[0][:T]
    for layer in range(n_layer):
        normed = norm(x, 'norm1', layer)
        q, k, v = (linear(normed, kind, layer).view(T, n_head, -1).transpose(0, 1) for kind in ('query', 'key', 'value'))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(2))
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear((scores.softmax(dim=2) @ v).transpose(0, 1).reshape(T, -1), 'proj', layer)
        x = x + linear(F.gelu(linear(norm(x, 'norm2', layer), 'up', layer), approximate=approximate), 'down', layer)
    return linear(norm(x, 'final'), 'head')


def chapter_7_state(n_layer, width, n_tokens=50, n_positions=32):
    """A state dict as chapter 7 of "Build a Large Language Model (From Scratch)" saves it, of random tensors."""
    shapes = {'tok_emb.weight': (n_tokens, width), 'pos_emb.weight': (n_positions, width)}
    for i in range(n_layer):
        block = f'trf_blocks.{i}.'
        for name in 'W_query', 'W_key', 'W_value', 'out_proj':
            shapes |= {f'{block}att.{name}.weight': (width, width), f'{block}att.{name}.bias': (width,)}
        shapes |= {f'{block}ff.layers.0.weight': (4 * width, width), f'{block}ff.layers.0.bias': (4 * width,)}
        shapes |= {f'{block}ff.layers.2.weight': (width, 4 * width), f'{block}ff.layers.2.bias': (width,)}
        for name in 'norm1', 'norm2':
            shapes |= {f'{block}{name}.scale': (width,), f'{block}{name}.shift': (width,)}
    shapes |= {'final_norm.scale': (width,), 'final_norm.shift': (width,)}
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(*shape, generator=draw) * 0.05 for name, shape in shapes.items()}
    for i in range(n_layer):
        state[f'trf_blocks.{i}.att.mask'] = torch.ones(n_positions, n_positions).triu(1)
    return state | {'out_head.weight': state['tok_emb.weight'].clone()}


@pytest.mark.parametrize('wrapped, qkv_bias', [(False, True), (True, True), (False, False)])
@torch.no_grad()
def test_chapter_7s_models_load(tmp_path, wrapped, qkv_bias):
    """
    gpt2-small124M-sft.pth holds the state dict alone; with the optimizer beside it, it is called model_state_dict. A model that chapter 5
    trains from scratch has no biases of queries, keys and values (qkv_bias=False).
    """
    state = chapter_7_state(2, 768)
    if not qkv_bias:
        state = {name: tensor for name, tensor in state.items() if not re.search('W_.*bias', name)}
    path = tmp_path / 'gpt2-small124M-sft.pth'
    torch.save({'model_state_dict': state, 'optimizer_state_dict': {'state': {}}} if wrapped else state, path)
    model = GPT.from_pretrained(path).eval()
    assert model.config == GPTConfig(32, 50, 2, 12, 768)
    if not qkv_bias:  # a bias that one block alone lacks is a fault, though
        torch.save({name: tensor for name, tensor in state.items() if name != 'trf_blocks.1.ff.layers.2.bias'}, tmp_path / 'faulty.pth')
        assert 'Missing key(s) in state_dict: "h.1.mlp.c_proj.bias"' in fault_of(tmp_path / 'faulty.pth')
    names = {'query': 'att.W_query', 'key': 'att.W_key', 'value': 'att.W_value', 'proj': 'att.out_proj', 'up': 'ff.layers.0', 'down': 'ff.layers.2'}
    others = {'tokens': ('tok_emb.weight', ''), 'positions': ('pos_emb.weight', ''), 'head': ('out_head.weight', ''),
              'final': ('final_norm.scale', 'final_norm.shift')}

    def get(kind, layer=None):
        if kind in others:
            weight, bias = others[kind]
        elif kind in names:
            weight, bias = (f'trf_blocks.{layer}.{names[kind]}.{part}' for part in ('weight', 'bias'))
        else:
            weight, bias = (f'trf_blocks.{layer}.{kind}.{part}' for part in ('scale', 'shift'))
        return state[weight], state.get(bias)

    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    torch.testing.assert_close(model(ids[None])[0], plain_logits(get, ids, 2, 12, 'tanh'), atol=1e-4, rtol=1e-4)


def test_an_untied_output_layer_is_refused(tmp_path):
    state = chapter_7_state(1, 768)
    state['out_head.weight'][3] += 1
    torch.save(state, tmp_path / 'x.pth')
    said = fault_of(tmp_path / 'x.pth')
    assert 'cannot read' in said and 'x.pth' in said and 'its output layer differs from its token embedding' in said


@pytest.mark.parametrize('has_biases', [True, False])
@torch.no_grad()
def test_nanogpts_checkpoints_load(tmp_path, has_biases):
    """Its ckpt.pt tells the shapes in model_args, and the names of a compiled model have a prefix. By default it has no biases."""
    n_layer, n_head, width, n_tokens, n_positions = 2, 4, 48, 60, 20
    shapes = {'wte.weight': (n_tokens, width), 'wpe.weight': (n_positions, width), 'ln_f.weight': (width,)}
    for i in range(n_layer):
        shapes |= {f'h.{i}.ln_1.weight': (width,), f'h.{i}.ln_2.weight': (width,)}
        shapes |= {f'h.{i}.attn.c_attn.weight': (3 * width, width), f'h.{i}.attn.c_proj.weight': (width, width)}
        shapes |= {f'h.{i}.mlp.c_fc.weight': (4 * width, width), f'h.{i}.mlp.c_proj.weight': (width, 4 * width)}
    if has_biases:
        shapes |= {name.replace('.weight', '.bias'): shape[:1] for name, shape in shapes.items() if name[:3] not in ('wte', 'wpe')}
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(*shape, generator=draw) * 0.1 for name, shape in shapes.items()}
    theirs = {f'_orig_mod.transformer.{name}': tensor for name, tensor in state.items()}
    theirs |= {f'_orig_mod.transformer.h.{i}.attn.bias': torch.ones(1, 1, n_positions, n_positions).tril() for i in range(n_layer)}
    theirs['_orig_mod.lm_head.weight'] = theirs['_orig_mod.transformer.wte.weight']
    model_args = {'n_layer': n_layer, 'n_head': n_head, 'n_embd': width, 'block_size': n_positions, 'bias': has_biases,
                  'vocab_size': n_tokens, 'dropout': 0.0}
    torch.save({'model': theirs, 'optimizer': {'state': {}, 'param_groups': []}, 'model_args': model_args, 'iter_num': 5,
                'best_val_loss': torch.tensor(3.0), 'config': {'dataset': 'openwebtext'}}, tmp_path / 'ckpt.pt')
    model = GPT.from_pretrained(tmp_path).eval()
    assert model.config == GPTConfig(n_positions, n_tokens, n_layer, n_head, width)
    names = {'proj': 'attn.c_proj', 'up': 'mlp.c_fc', 'down': 'mlp.c_proj', 'norm1': 'ln_1', 'norm2': 'ln_2'}
    others = {'tokens': 'wte', 'positions': 'wpe', 'head': 'wte', 'final': 'ln_f'}

    def get(kind, layer=None):
        if kind in ('query', 'key', 'value'):
            first = width * ('query', 'key', 'value').index(kind)
            rows = slice(first, first + width)
            bias = state.get(f'h.{layer}.attn.c_attn.bias')
            return state[f'h.{layer}.attn.c_attn.weight'][rows], None if bias is None else bias[rows]
        name = others.get(kind) or f'h.{layer}.{names[kind]}'
        return state[f'{name}.weight'], state.get(f'{name}.bias')

    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    torch.testing.assert_close(model(ids[None])[0], plain_logits(get, ids, n_layer, n_head, 'tanh'), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('form', ['openai', 'pth', 'safetensors'])
def test_mapped_weights_are_the_same_and_the_file_stays_as_it_is(tmp_path, form):
    from safetensors.torch import save_file
    where = TINY
    plain = GPT.from_pretrained(TINY)
    if form == 'pth':
        where = tmp_path / 'tiny-sft.pth'
        torch.save(plain.state_dict(), where)
        where.with_suffix('.json').write_text(json.dumps({'model': vars(plain.config)}))
    elif form == 'safetensors':
        where = tmp_path / 'model.safetensors'
        save_file({name: model_file.transpose_conv1d(name, p.data).contiguous() for name, p in plain.named_parameters()}, where)
        (tmp_path / 'config.json').write_text((TINY / 'hparams.json').read_text())
    files = [path for path in (where.iterdir() if where.is_dir() else [where]) if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    mapped = GPT.from_pretrained(where, mapped=True)
    for (name, p), q in zip(plain.named_parameters(), mapped.parameters()):
        assert torch.equal(p, q) and q.dtype == torch.float32, name
        q.data.zero_()  # a private mapping
    assert {path: path.read_bytes() for path in files} == before
