"""Batches and the loss: what is supervised, that packing is the same function, that pads and neighbours do not leak."""
from dataclasses import replace

import model as model_module
from model import GPT, GPTConfig, causal_attention, packed_attention
from prepare import EOS, IGNORE, SPLITS, Split, encode_prompt, get_tokenizer, make_batch

import numpy as np
import pytest
import torch
from conftest import ROWS
from torch.nn import functional as F

CONFIG = GPTConfig(block_size=128, vocab_size=512, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG).double()
    for p in model.parameters():  # larger than at initialization, so that attention attends
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def train(data):
    """The train split, its ids renumbered from 0: a softmax among 50,257 tokens would take nearly all of the time."""
    ids, meta = data('train')
    vocabulary, renumbered = np.unique(ids, return_inverse=True)
    assert len(vocabulary) < CONFIG.vocab_size
    return Split(renumbered.astype(np.uint16), meta | {'eos': int(np.searchsorted(vocabulary, EOS))})


def tensors(batch):
    return [torch.from_numpy(array) for array in batch]


def loss_and_gradients(model, batch):
    """The mean loss of a batch (ids, targets, positions, and segments or none), and the gradient of each parameter."""
    model.zero_grad()
    loss = model(*tensors(batch))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def reference_loss(model, data, numbers, first_target='answer'):
    """The sum and the count of the losses of the supervised tokens, a row at a time, from full logits: an independent computation."""
    ids, meta = data
    total = 0.0
    count = 0
    for n in numbers:
        row = torch.from_numpy(ids[meta['start'][n]:meta['end'][n]].astype(np.int64))
        first = 1 if first_target == 'start' else meta[first_target][n] - meta['start'][n]
        logits = model(row[None])[0]
        total = total + F.cross_entropy(logits[first - 1:-1], row[first:], reduction='sum')
        count += len(row) - first
    return total, count


# --- what is supervised


@pytest.mark.parametrize('packing', [True, False])
def test_the_targets_are_the_answers_and_their_ends(data, packing):
    """The supervised targets, decoded, are each answer and one end-of-text; every pad and prompt is IGNORE."""
    train = data('train')
    ids, meta = train
    x, y, positions, segments = make_batch(train, range(5), packing, block_size=128)
    answers = []
    for row, segment in zip(y, segments):
        for s in range(1, segment.max() + 1) if packing else [0]:
            answers.append(get_tokenizer().decode(row[(segment == s) & (row != IGNORE)].tolist()))
    expected = [get_tokenizer().decode(ids[start:end].tolist()) for start, end in zip(meta['answer'][:5], meta['end'][:5])]
    assert sorted(answers) == sorted(expected)
    assert all(text.count('<|endoftext|>') == 1 for text in answers)
    assert (y == EOS).sum() == 5
    assert (y[segments == -1] == IGNORE).all()
    if not packing:
        assert answers == expected  # rows keep their order


def test_the_first_target_is_the_first_token_of_the_answer(data):
    """Neither early nor late: the id before it predicts it."""
    ids, meta = data('train')
    x, y, _, _ = make_batch((ids, meta), range(5), packing=False)
    for n in range(5):
        first = np.flatnonzero(y[n] != IGNORE)[0]
        assert y[n][first] == ids[meta['answer'][n]]
        assert x[n][first] == ids[meta['answer'][n] - 1]
        assert (y[n] != IGNORE).sum() == meta['end'][n] - meta['answer'][n]


def test_an_oracle_has_no_loss_and_a_copier_does(data):
    x, y, _, _ = make_batch(data('train'), range(8), packing=False)
    keep = y != IGNORE
    following = np.concatenate([x[:, 1:], np.full((len(x), 1), EOS)], axis=1)
    assert (following[keep] == y[keep]).all()  # the next token of the input is the target
    assert (x[keep] != y[keep]).mean() > 0.8


def test_prompts_and_answers_encode_apart(data):
    """In some rows a merge would cross from prompt to answer; in none of the files does one."""
    encode = get_tokenizer().encode_ordinary
    apart = set()
    n_crossing = 0
    for row in ROWS:
        ids = encode_prompt(row) + encode(row['output']) + [EOS]
        n_crossing += ids[:-1] != encode(get_tokenizer().decode(ids[:-1]))
        apart.add(tuple(ids))
    assert n_crossing > 0
    for split in SPLITS:
        ids, meta = data(split)
        assert all(tuple(ids[start:end].tolist()) in apart for start, end in zip(meta['start'], meta['end']))


# --- packing


@pytest.mark.parametrize('loss_on, first_target', [('response', 'answer'), ('response+header', 'header'), ('all', 'start')])
@pytest.mark.parametrize('block_size', [1024, 128])
def test_packed_equals_one_by_one(model, train, loss_on, first_target, block_size):
    """Loss and every gradient, in fp64, in one row and in several, against rows that never met."""
    numbers = np.random.default_rng(0).permutation(len(train.meta['start']))[:9]
    packed = make_batch(train, numbers, True, loss_on, block_size)
    assert len(packed[0]) == 1 if block_size == 1024 else 1 < len(packed[0]) < 9
    loss, gradients = loss_and_gradients(model, packed)
    model.zero_grad()
    total, count = reference_loss(model, train, numbers, first_target)
    (total / count).backward()
    assert (packed[1] != IGNORE).sum() == count
    assert loss == pytest.approx((total / count).item(), rel=1e-12)
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-10, atol=1e-14)


def test_packed_equals_unpacked_in_fp32(model, train):
    model.float()
    packed, gradients = loss_and_gradients(model, make_batch(train, range(8), True))
    unpacked, others = loss_and_gradients(model, make_batch(train, range(8), False)[:3])
    assert packed == pytest.approx(unpacked, rel=1e-6)
    for a, b in zip(gradients, others):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_packed_rows_are_full_and_even(train):
    """No row is much shorter than another, which would be padded to the longest's length; and all examples are there."""
    n_examples = train.meta['examples']
    lengths = train.meta['end'] - train.meta['start']
    for block_size in 128, 200, 1024:
        _, _, _, segments = make_batch(train, range(n_examples), True, block_size=block_size)
        filled = (segments >= 0).sum(1)
        assert segments.shape[1] <= block_size
        assert filled.max() - filled.min() <= lengths.max()
        assert sum(row.max() for row in segments) == n_examples
        assert len(filled) <= 1.2 * lengths.sum() / block_size + 1


def test_packing_needs_no_shared_prefix(model, train):
    ids, meta = train
    without = ids, {**meta, 'shared_prefix': 0}
    packed = make_batch(without, range(6), True)
    assert packed[0].shape[1] > make_batch((ids, meta), range(6), True)[0].shape[1]
    unpacked = make_batch(without, range(6), False)[:3]
    assert loss_and_gradients(model, packed)[0] == pytest.approx(loss_and_gradients(model, unpacked)[0])


def test_packing_without_segments_is_another_function(model, train):
    """The same rows with all in one segment, plainly causal: what must never be computed."""
    x, y, positions, segments = make_batch(train, range(8), True)
    right, _ = loss_and_gradients(model, (x, y, positions, segments))
    naive, _ = loss_and_gradients(model, (x, y, positions, np.zeros_like(segments)))
    assert abs(right - naive) > 1e-3


# segments of rows of 100 positions: as make_batch makes them, without a prefix, without neighbours, and in any order
SEGMENTS = [
    [0] * 5 + [1] * 40 + [2] * 3 + [3] * 45 + [-1] * 7,
    [1] * 40 + [2] * 60,
    [0] * 100,
    list(range(100)),
    [0] * 3 + [1] * 40 + [2] * 20 + [0] * 2 + [1] * 35,
    [1, 2] * 20 + [3] * 40 + [1] * 20,
]


@pytest.mark.parametrize('first, second', list(zip(SEGMENTS, SEGMENTS[1:] + SEGMENTS[:1])))
def test_attention_sees_its_own_segment_and_the_shared_one(first, second):
    """Two rows at once, against sums over each query's keys."""
    torch.manual_seed(0)
    segments = torch.tensor([first, second])
    q, k, v = torch.randn(3, 2, 4, 100, 8, dtype=torch.float64)
    found = packed_attention(segments)(q, k, v)
    for b, t in np.ndindex(2, 100):
        keys = [s for s in range(t + 1) if segments[b, s] in (0, segments[b, t])]
        weights = torch.einsum('hc,hsc->hs', q[b, :, t], k[b, :, keys]).div(8 ** 0.5).softmax(1)
        torch.testing.assert_close(found[b, :, t], torch.einsum('hs,hsc->hc', weights, v[b, :, keys]))


def test_attention_in_one_segment_is_causal_attention():
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    torch.testing.assert_close(packed_attention(torch.zeros(2, 10, dtype=torch.long))(q, k, v), causal_attention(q, k, v))


# --- pads and batches


def test_padding_does_not_leak(model, train):
    batch = make_batch(train, [0], True)
    alone, gradients = loss_and_gradients(model, batch)
    padded = [np.pad(array, [(0, 0), (0, 37)], constant_values=value) for array, value in zip(batch, (0, IGNORE, 0, -1))]
    loss, others = loss_and_gradients(model, padded)
    assert loss == pytest.approx(alone, rel=1e-12)
    for a, b in zip(gradients, others):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_batch_of_many_pads_is_finite(model, train):
    """A row of one example beside a row of ten: no query is left without a key."""
    batch = make_batch(train, range(11), True, block_size=int((train.meta['end'] - train.meta['start']).max()) + 20)
    assert (batch[3] == -1).any()
    loss, gradients = loss_and_gradients(model, batch)
    assert np.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize('size', [1, 3, 8])
@pytest.mark.parametrize('packing', [True, False])
def test_evaluation_does_not_depend_on_the_batch_size(model, train, size, packing):
    """Sums over batches, a short last one included, are divided once: a mean of means would depend on it."""
    total = 0.0
    for i in range(0, 11, size):
        batch = make_batch(train, range(i, min(i + size, 11)), packing)
        total += model(*tensors(batch)[:4 if packing else 3], loss_reduction='sum').item()
    reference, count = reference_loss(model, train, range(11))
    assert total / count == pytest.approx((reference / count).item(), rel=1e-9)


@pytest.mark.parametrize('n_micro_batches', [1, 2, 8])
def test_accumulation_is_one_step(model, train, n_micro_batches):
    """1 x 8, 2 x 4, 8 x 1 rows of unequal length: gradients equal to 1e-6 in fp32, also after clipping."""
    model.float()
    whole_batch = make_batch(train, range(8))
    whole, gradients = loss_and_gradients(model, whole_batch)
    count = (whole_batch[1] != IGNORE).sum()
    model.zero_grad()
    total = 0.0
    for chunk in np.array_split(np.arange(8), n_micro_batches):
        loss = model(*tensors(make_batch(train, chunk)), loss_reduction='sum') / count
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole, rel=1e-6)
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    # clipped
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient * 0.5 / norm, rtol=1e-4, atol=1e-6)


# --- the loss


@pytest.mark.parametrize('dtype, loss_error, gradient_error', [(torch.float64, 1e-9, 1e-9), (torch.bfloat16, 1e-5, 0.05)])
def test_logits_in_chunks_give_the_same_loss(model, train, monkeypatch, dtype, loss_error, gradient_error):
    """More supervised positions than logits are held for at once, in fp64 and under autocast."""
    batch = make_batch(train, range(8), True, 'all')
    is_half = dtype == torch.bfloat16
    if is_half:
        model.float()
    with torch.autocast('cpu', torch.bfloat16, enabled=is_half):
        loss, gradients = loss_and_gradients(model, batch)
        monkeypatch.setattr(model_module, 'LOGITS_CHUNK', 50)
        chunked, others = loss_and_gradients(model, batch)
    assert chunked == pytest.approx(loss, rel=loss_error)
    for a, b in zip(gradients, others):
        torch.testing.assert_close(a, b, rtol=gradient_error, atol=gradient_error * b.abs().max().item())


def test_each_loss_row_by_row(model, train):
    batch = tensors(make_batch(train, range(3), packing=False))[:3]
    losses = model(*batch, loss_reduction='none').split((batch[1] != IGNORE).sum(1).tolist())
    for n, its_losses in enumerate(losses):
        total, count = reference_loss(model, train, [n])
        assert len(its_losses) == count
        assert its_losses.sum().item() == pytest.approx(total.item(), rel=1e-6)


def test_dropout_is_off_in_evaluation():
    torch.manual_seed(0)
    model = GPT(replace(CONFIG, dropout=0.5))
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


# --- the network's shape


def test_the_initialization_is_gpt_2s():
    """0.02, 0.01 for positions, what is added to the residual stream over the square root of the number of additions, biases zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=2, n_embd=128, block_size=512))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std['wte.weight'] == pytest.approx(0.02, rel=0.03)
    assert std['wpe.weight'] == pytest.approx(0.01, rel=0.03)
    assert std['h.3.attn.c_attn.weight'] == pytest.approx(0.02, rel=0.03)
    for matrix in 'attn', 'mlp':
        assert std[f'h.3.{matrix}.c_proj.weight'] == pytest.approx(0.02 / 16 ** 0.5, rel=0.03)
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all()
        elif 'ln_' in name:
            assert (p == 1).all()


@pytest.mark.parametrize('n_parameters, n_layer, n_head, n_embd', [
    (124_439_808, 12, 12, 768), (354_823_168, 24, 16, 1024), (774_030_080, 36, 20, 1280), (1_557_611_200, 48, 25, 1600)])
def test_the_four_sizes_have_openais_numbers_of_parameters(n_parameters, n_layer, n_head, n_embd):
    with torch.device('meta'):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert sum(p.numel() for p in model.parameters()) == n_parameters
