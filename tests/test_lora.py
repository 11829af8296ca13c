"""LoRA and QLoRA: what is trained, that nothing changes at first, that merging changes nothing, what an adapter fits, what is refused."""
import subprocess
import sys
import weakref
from dataclasses import asdict
from importlib.util import find_spec

import lora
from config import UserError
from engine import for_inference, generate
from lora import LoRA, add_lora, load_adapter, merge_lora, merged_state_dict, save_adapter
from model import GPT, GPTConfig, fingerprint

import pytest
import torch
from conftest import ROOT
from torch import nn

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=300, block_size=64)
IDS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
PROMPTS = [[1, 2, 3], [1, 2, 9, 8, 7]]
needs_bitsandbytes = pytest.mark.skipif(find_spec('bitsandbytes') is None, reason='needs bitsandbytes')
KINDS = ['none', pytest.param('nf4', marks=needs_bitsandbytes)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG)


def trained(model):
    """Fill A and B, as training would."""
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model


def test_at_first_the_model_is_the_base(model):
    before = model(IDS)
    add_lora(model, 4, 8.0)
    assert torch.equal(model(IDS), before)


def test_a_and_b_of_the_chosen_matrices_are_trained_and_nothing_else(model):
    add_lora(model, 4, 8.0, targets='attn.c_attn, mlp.c_proj')
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == [f'h.{i}.{matrix}.{part}' for i in range(2) for matrix in ('attn.c_attn', 'mlp.c_proj') for part in 'AB']
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * ((64 + 192) + (256 + 64))
    model(IDS, IDS).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('quantize', KINDS)
def test_merged_is_the_same_function(model, quantize):
    order = list(model.state_dict())
    before = model(IDS)
    add_lora(model, 4, 8.0, targets='attn.c_proj,mlp.c_fc', quantize=quantize)
    logits = trained(model)(IDS)
    state = merged_state_dict(model)
    merged = GPT(CONFIG)
    merged.load_state_dict(state)
    torch.testing.assert_close(merged(IDS), logits, rtol=1e-5, atol=1e-5)
    assert list(state) == order and (logits - before).abs().max() > 0.01
    assert torch.equal(model(IDS), logits)  # the model stays as it is


def test_a_layer_computes_w_plus_alpha_by_rank_times_b_a(model):
    weight = model.h[0].mlp.c_fc.weight.detach().clone()
    add_lora(model, 4, 8.0)
    trained(model)
    layer = model.h[0].mlp.c_fc
    assert isinstance(layer, LoRA)
    x = torch.randn(3, 64)
    expected = x @ (weight + 2.0 * layer.B @ layer.A).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_merging_unpacks_one_matrix_at_a_time(model, monkeypatch):
    """Of an XL in 4 bits, all of them unpacked would take 6 GB of the device at the very end of a run."""
    add_lora(model, 4, 8.0, targets='mlp.c_fc')
    alive = []
    most = []

    def dequantize(weight):
        matrix = weight.detach().clone()  # as if it had been in 4 bits
        alive.append(weakref.ref(matrix))
        most.append(sum(other() is not None for other in alive))
        return matrix

    monkeypatch.setattr(lora, 'dequantize', dequantize)
    merged_state_dict(trained(model))
    assert len(most) > 8 and max(most) == 1


def test_merging_adds_one_matrix_at_most():
    """Measured in a process of its own, on matrices of 16 MB: as large as Medium's widest ones."""
    code = """
import resource, torch
from lora import add_lora, merge_lora
from model import GPT, GPTConfig
torch.set_num_threads(1)
model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=4, n_head=16, n_embd=1024))
add_lora(model, 16, 16.0, targets='mlp.c_fc')
add = torch.addmm(torch.zeros(9, 9), torch.ones(9, 9), torch.ones(9, 9))  # what the first product loads is not the merge's
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_lora(model)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(process.stdout) < 1.5 * 16


def test_generation_with_lora_is_that_of_the_merged_model(model):
    add_lora(model, 4, 8.0)
    expected = GPT(CONFIG)
    expected.load_state_dict(merged_state_dict(trained(model)))
    answers = generate(expected, PROMPTS, 10, eos=-1)
    assert generate(model, PROMPTS, 10, eos=-1) == answers
    merge_lora(model)
    assert not any(isinstance(module, LoRA) for module in model.modules())
    assert list(model.state_dict()) == list(expected.state_dict())
    assert generate(for_inference(model, torch.device('cpu'), torch.float32), PROMPTS, 10, eos=-1) == answers


@pytest.mark.parametrize('quantize', KINDS)
def test_generation_under_autocast(model, quantize):
    """4-bit layers return their input's dtype, fp32, while the cache is in autocast's."""
    add_lora(model, 4, 8.0, quantize=quantize)
    with torch.autocast('cpu', torch.bfloat16):
        answers = generate(trained(model), PROMPTS, 10, eos=-1)
    assert [len(answer) for answer in answers] == [10, 10]


# --- adapters


@pytest.fixture
def adapter(model, tmp_path):
    """(path of an adapter of every attn.c_attn, {name: tensor} of its base, the logits of both together)."""
    base = {name: p.detach().clone() for name, p in model.state_dict().items()}
    about = {'model': asdict(CONFIG), 'init_from': 'somewhere', 'made_of': {'base weights': fingerprint(base), 'data': 'x'}}
    add_lora(model, 4, 8.0, targets='attn.c_attn')
    logits = trained(model)(IDS)
    save_adapter(model, tmp_path / 'adapter.safetensors', about)
    return tmp_path / 'adapter.safetensors', base, logits


def base_model(weights, **shape):
    model = GPT(GPTConfig(**vars(CONFIG) | shape))
    if weights:
        model.load_state_dict(weights)
    return model


def rewrite(path, tensors=None, **metadata):
    """Write an adapter again with other tensors, {name: tensor} -> the same, or with other metadata."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    with safe_open(path, 'pt') as file:
        about = file.metadata() | metadata
        state = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors(state) if tensors else state, path, about)


def test_an_adapter_on_its_base_is_the_model_that_was_trained(adapter):
    path, weights, logits = adapter
    again = base_model(weights)
    about = load_adapter(again, path)
    assert torch.equal(again(IDS), logits)
    assert about['init_from'] == 'somewhere' and about['lora'] == {'rank': 4, 'alpha': 8.0, 'targets': 'attn.c_attn'}


def test_dropout_is_not_part_of_what_an_adapter_fits(adapter):
    path, weights, logits = adapter
    again = base_model(weights, dropout=0.3).eval()
    load_adapter(again, path)
    assert torch.equal(again(IDS), logits)


def test_an_adapter_of_another_shape_is_refused(adapter):
    path, _, _ = adapter
    with pytest.raises(UserError, match='fits somewhere'):
        load_adapter(base_model(None, n_layer=3), path)


def test_an_adapter_of_another_base_is_refused(adapter):
    """The same shape, but trained anew: its answers would be those of neither model."""
    path, weights, logits = adapter
    torch.manual_seed(1)
    with pytest.raises(UserError, match='was made with other base weights than these .*it fits somewhere as that was then'):
        load_adapter(base_model(None), path)
    rewrite(path, made_of='{}')  # one that does not tell its base is taken as it is
    again = base_model(weights)
    load_adapter(again, path)
    assert torch.equal(again(IDS), logits)


@pytest.mark.parametrize('tensors', [
    lambda state: {f'transformer.{name}': tensor for name, tensor in state.items()},
    lambda state: {name: tensor for name, tensor in state.items() if not name.startswith('h.1.')},
    lambda state: state | {'h.2.attn.c_attn.A': torch.zeros(4, 64)},
    lambda state: {name: torch.cat([tensor, tensor]) for name, tensor in state.items()},
], ids=['a prefix', 'a layer less', 'a tensor more', 'another rank'])
def test_an_adapter_whose_names_or_shapes_do_not_fit_is_refused(adapter, tensors):
    """Loaded loosely, it would answer as the base."""
    path, weights, _ = adapter
    rewrite(path, tensors)
    with pytest.raises(UserError, match='does not fit: .*h.*attn.c_attn'):
        load_adapter(base_model(weights), path)


@pytest.mark.parametrize('spoil', [
    lambda path: path.write_bytes(b'<xml>'),
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.unlink(),
    lambda path: rewrite(path, lora='{"rank"'),
    lambda path: rewrite(path, model='null'),
    lambda path: rewrite(path, lora='{}')],
    ids=['a page', 'cut', 'absent', 'cut metadata', 'no shape', 'no rank'])
def test_a_file_that_is_not_an_adapter_is_told(adapter, spoil):
    path, weights, _ = adapter
    spoil(path)
    with pytest.raises(UserError, match='is not an adapter') as error:
        load_adapter(base_model(weights), path)
    assert '\n' not in str(error.value)


# --- 4 bits


@needs_bitsandbytes
def test_nf4_trains_in_4_bits(model):
    before = model(IDS)
    add_lora(model, 4, 8.0, quantize='nf4')
    matrices = [layer.base.weight for layer in model.modules() if isinstance(layer, LoRA)]
    assert all(weight.dtype == torch.uint8 and not weight.requires_grad for weight in matrices) and len(matrices) == 8
    assert 0 < (model(IDS) - before).abs().max() < 0.5
    first = model(IDS, IDS).item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        model.eval()
        model(IDS)  # evaluation between steps leaves the layers trainable
        model.train()
        optimizer.zero_grad()
        loss = model(IDS, IDS)
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.1


def test_without_the_package_one_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    monkeypatch.setitem(sys.modules, 'bitsandbytes.nn', None)
    with pytest.raises(ModuleNotFoundError, match='bitsandbytes'):  # config says what to install
        add_lora(model, 4, 8.0, quantize='nf4')


@pytest.mark.parametrize('targets', ['wte', '', 'attn.c_attn,', 'attn'])
def test_targets_that_are_not_matrices_of_a_block_are_refused(model, targets):
    with pytest.raises(UserError, match='lora_targets=.* may name attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj'):
        add_lora(model, 4, 8.0, targets=targets)
