"""LoRA and QLoRA: what is trained, that nothing changes at first, that merging changes nothing, what is refused."""
import copy
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from config import UserError
from lora import (
    LoRA,
    add_lora,
    for_inference,
    init_for_copying,
    load_adapter,
    merged_state_dict,
    parts_of,
    save_adapter,
    train_met_tokens,
)
from model import GPT, GPTConfig
from prepare import get_tokenizer

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=300, block_size=64)
IDS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
KINDS = ['none', pytest.param('nf4', marks=pytest.mark.skipif(find_spec('bitsandbytes') is None, reason='needs bitsandbytes'))]


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


def test_step_0_is_the_base(model):
    before = model(IDS)[0]
    add_lora(model, 4, 8.0)
    assert torch.equal(model(IDS)[0], before)


def test_what_is_trained(model):
    add_lora(model, 4, 8.0, targets='attn.c_attn, mlp.c_proj')
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == [f'h.{i}.{matrix}.{part}' for i in range(2) for matrix in ('attn.c_attn', 'mlp.c_proj') for part in 'AB']
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * ((64 + 192) + (256 + 64))
    model(IDS, IDS)[1].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('quantize', KINDS)
def test_merged_is_the_same_function(model, quantize):
    plain = model.state_dict()
    order, before = list(plain), model(IDS)[0]
    add_lora(model, 4, 8.0, targets='attn.c_proj,mlp.c_fc', quantize=quantize)
    logits = trained(model)(IDS)[0]
    merged = GPT(CONFIG)
    merged.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(merged(IDS)[0], logits, rtol=1e-5, atol=1e-5)
    assert list(merged_state_dict(model)) == order and (logits - before).abs().max() > 0.01


def test_an_independent_computation(model):
    """W + alpha / rank B A, by hand."""
    weight = model.h[0].mlp.c_fc.weight.detach().clone()
    add_lora(model, 4, 8.0)
    trained(model)
    layer = model.h[0].mlp.c_fc
    assert isinstance(layer, LoRA)
    x = torch.randn(3, 64)
    expected = x @ (weight + 2.0 * layer.B @ layer.A).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_generation_serves_it(model):
    add_lora(model, 4, 8.0)
    trained(model)
    merged = GPT(CONFIG)
    merged.load_state_dict(merged_state_dict(model))
    prompts = [[1, 2, 3], [1, 2, 9, 8, 7]]
    assert model.generate(prompts, 10, eos=-1) == merged.generate(prompts, 10, eos=-1)


@pytest.mark.parametrize('quantize', KINDS)
def test_generation_under_autocast(model, quantize):
    """4-bit layers return their input's dtype, fp32, while the cache is in autocast's."""
    add_lora(model, 4, 8.0, quantize=quantize)
    with torch.autocast('cpu', torch.bfloat16):
        answers = trained(model).generate([[1, 2, 3], [1, 2, 9, 8, 7]], 10, eos=-1)
    assert [len(answer) for answer in answers] == [10, 10]


def test_adapter_round_trip(model, tmp_path):
    from dataclasses import asdict
    base = {name: p.clone() for name, p in model.state_dict().items()}
    add_lora(model, 4, 8.0, targets='attn.c_attn')
    logits = trained(model)(IDS)[0]
    save_adapter(model, tmp_path / 'adapter.safetensors', {'model': asdict(CONFIG), 'init_from': 'somewhere'})
    again = GPT(CONFIG)
    again.load_state_dict(base)
    load_adapter(again, tmp_path / 'adapter.safetensors')
    assert torch.equal(again(IDS)[0], logits)
    with pytest.raises(UserError, match='fits somewhere'):
        load_adapter(GPT(GPTConfig(n_layer=3, n_head=2, n_embd=64, vocab_size=300, block_size=64)), tmp_path / 'adapter.safetensors')
    (tmp_path / 'adapter.safetensors').write_bytes(b'<xml>')
    with pytest.raises(UserError, match='is not an adapter'):
        load_adapter(again, tmp_path / 'adapter.safetensors')


@pytest.mark.skipif(find_spec('bitsandbytes') is None, reason='needs bitsandbytes')
def test_nf4_trains_in_4_bits(model):
    before = model(IDS)[0]
    add_lora(model, 4, 8.0, quantize='nf4')
    matrices = [layer.base.weight for layer in model.modules() if isinstance(layer, LoRA)]
    assert all(weight.dtype == torch.uint8 and not weight.requires_grad for weight in matrices) and len(matrices) == 8
    assert 0 < (model(IDS)[0] - before).abs().max() < 0.5
    first = model(IDS, IDS)[1].item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        model.eval()
        model(IDS)  # evaluation between steps leaves the layers trainable
        model.train()
        optimizer.zero_grad()
        loss = model(IDS, IDS)[1]
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.1


def test_without_the_package_one_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    monkeypatch.setitem(sys.modules, 'bitsandbytes.nn', None)
    with pytest.raises(UserError, match='pip install bitsandbytes=='):
        add_lora(model, 4, 8.0, quantize='nf4')


@pytest.mark.parametrize('kwargs', [{'targets': 'wte'}, {'quantize': 'int8'}])
def test_mistakes_are_named(model, kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs.values()))):
        add_lora(model, 4, 8.0, **kwargs)


# --- a start from scratch that copies words

@pytest.fixture(scope='module')
def copying():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=128, block_size=128))
    init_for_copying(model)
    return model.eval()


@pytest.mark.parametrize('token, parts', [
    (' kicked', ('kick', 'ed', True, False)), ('Kick', ('kick', '', False, True)), (' stopped', ('stop', 'ed', True, False)),
    (' boxes', ('box', 's', True, False)), (' cities', ('cit', 's', True, False)), (' city', ('cit', 'y', True, False)),
    (' red', ('red', '', True, False)), (' falling', ('fall', 'ing', True, False)), ('42', ('42', '', False, False)),
    (' é', (' é', '', False, False)), ('\n\n', ('\n\n', '', False, False)), (' ', (' ', '', False, False)), ('!!', ('!!', '', False, False))])
def test_parts_of_a_token(token, parts):
    assert parts_of(token) == parts


def attention(model, ids):
    """-> the weights of attention (H, T, T) of each layer."""
    found = []

    def attend(q, k, v):
        T = q.size(2)
        scores = (q @ k.mT / q.size(3) ** 0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        found.append(scores.softmax(dim=3)[0])
        return found[-1] @ v
    with torch.no_grad():
        model.hidden_states(ids[None], torch.arange(len(ids))[None], [attend] * len(model.h))
    return found


def test_the_heads_of_induction(copying):
    """Random tokens, twice: a head of the first layer reads the token before, and the second layer looks more than others at what
    stood behind the present token."""
    ids = torch.randperm(50256, generator=torch.Generator().manual_seed(1))[:40].repeat(2)
    first, second = attention(copying, ids)
    assert (first[0, 1:].argmax(dim=1) == torch.arange(79)).all() and first[0, 1:].diagonal().mean() > 0.9
    behind = second[:2, torch.arange(40, 79), torch.arange(1, 40)].mean()
    assert behind > 2 * second[2:, torch.arange(40, 79), torch.arange(1, 40)].mean()
    torch.manual_seed(0)
    plain = attention(GPT(copying.config).eval(), ids)[0]
    assert plain[0, 1:].diagonal().mean() < 0.2


def test_the_model_before_training_is_made_again(copying):
    """sample.py's, from the shape and the config that a run keeps."""
    from sample import load_before
    again = load_before({'init_from': 'scratch', 'model': vars(copying.config), 'config': {'seed': 0, 'init': 'copying'}}, '', 'openai')
    assert all(torch.equal(p, q) for p, q in zip(copying.parameters(), again.parameters()))
    plain = load_before({'init_from': 'scratch', 'model': vars(copying.config), 'config': {'seed': 0}}, '', 'openai')  # the config of a run of before
    assert plain.wte.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_tokens_of_one_stem_are_near(copying):
    tokenizer = get_tokenizer()
    vectors = {word: copying.wte.weight[tokenizer.encode_ordinary(word)[0]].detach() for word in (' kick', ' kicked', ' painted', ' paint', ' tree')}
    def near(a, b):
        return torch.cosine_similarity(vectors[a], vectors[b], dim=0).item()
    assert min(near(' kick', ' kicked'), near(' paint', ' painted')) > 0.5 > 0.4 > near(' kick', ' tree')
    past = [vectors[' kicked'] - vectors[' kick'], vectors[' painted'] - vectors[' paint']]
    assert torch.cosine_similarity(*past, dim=0) > 0.2  # what such pairs differ by is partly the same


def test_only_tokens_of_the_training_rows_move(copying):
    model = copy.deepcopy(copying).train()
    ids = torch.tensor([[5, 7, 9, 7]])
    train_met_tokens(model, np.array([5, 7, 9], '<u2'))
    before = model.wte.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, ids)[1].backward()
        optimizer.step()
    moved = (model.wte.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [5, 7, 9]
    with pytest.raises(UserError, match='shard'):
        train_met_tokens(model, np.array([5]), shard=True)


def test_the_sampled_output_layer_stands_for_the_whole_one(model):
    """In evaluation the loss is that over all tokens; in training it is near that, and other for each draw."""
    ids = IDS % 40
    exact = model.eval()(ids, ids)[1]
    train_met_tokens(model, ids.numpy())
    assert torch.equal(model(ids, ids)[1], exact)
    model.train()
    drawn = torch.stack([model(ids, ids)[1] for _ in range(20)])
    assert drawn.unique().numel() > 10
    torch.testing.assert_close(drawn.mean(), exact, rtol=2e-3, atol=0)


@pytest.mark.skipif('fbgemm' not in torch.backends.quantized.supported_engines, reason='needs FBGEMM: x86 with AVX2')
@pytest.mark.parametrize('with_lora', [False, True])
def test_matrices_in_float16(model, with_lora):
    """All that changes is that the matrices are rounded: an fp32 model of rounded ones computes the same, its biases are exact."""
    if with_lora:
        add_lora(model, 4, 16.0)
        for name, p in model.named_parameters():
            if name.endswith('.B'):
                nn.init.normal_(p, std=0.1)
    rounded = GPT(model.config)
    state = merged_state_dict(model)
    rounded.load_state_dict({name: p.half().float() if p.dim() == 2 and 'wpe' not in name else p for name, p in state.items()})
    place, autocast = for_inference(torch.device('cpu'), torch.float16)
    prompts = [[1, 2, 3], [1, 2, 9, 8, 7], [5]]
    with torch.inference_mode(), autocast:
        place(model)
        logits, losses = model(IDS)[0], model(IDS, IDS, loss_reduction='none')[1]
        torch.testing.assert_close(logits, rounded.eval()(IDS)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(losses, rounded(IDS, IDS, loss_reduction='none')[1], rtol=1e-5, atol=1e-5)
        assert not torch.equal(logits, rounded.half().float()(IDS)[0])  # which rounds the rest, too
        assert model.generate(prompts, 20, eos=-1) == [model.generate([prompt], 20, eos=-1)[0] for prompt in prompts]
    assert logits.dtype == losses.dtype == torch.float32


@pytest.mark.parametrize('device, dtype, engines, is_enabled', [
    ('cpu', torch.float16, ['fbgemm'], False), ('cpu', torch.float16, ['qnnpack'], True), ('cpu', torch.bfloat16, ['fbgemm'], True),
    ('cpu', torch.float32, ['fbgemm'], False)])
def test_where_float16_is_that_of_the_matrices(model, monkeypatch, device, dtype, engines, is_enabled):
    """Elsewhere, and in bfloat16, it is autocast's, and the model stays as it is."""
    monkeypatch.setattr(type(torch.backends.quantized), 'supported_engines', engines)
    place, autocast = for_inference(torch.device(device), dtype)
    if dtype != torch.float16 or is_enabled:
        assert place(model) is model and model.wte.weight.dtype == torch.float32 and not model.training
    with autocast:
        assert torch.is_autocast_enabled('cpu') == is_enabled
        assert model(IDS)[0].dtype == (dtype if is_enabled else torch.float32)


@pytest.mark.parametrize('shape', [{'n_head': 2}, {'n_layer': 1}, {'vocab_size': 300}])
def test_shapes_that_cannot_copy(shape):
    with pytest.raises(UserError, match='copying'):
        init_for_copying(GPT(GPTConfig(**{'n_layer': 2, 'n_head': 4, 'n_embd': 64, 'block_size': 64} | shape)))
