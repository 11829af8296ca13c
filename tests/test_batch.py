"""Batches and the loss: what is supervised, that packing is the same function, that pads and neighbours don't leak."""
import numpy as np
import pytest
import torch
from conftest import ROWS
from torch.nn import functional as F

from model import GPT, GPTConfig, segment_mask
from prepare import EOS, IGNORE, SPLITS, encode_prompt, get_tokenizer, make_batch

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG).double()
    for p in model.parameters():  # larger than at initialisation, so that attention attends
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def tensors(batch):
    return [torch.from_numpy(array) for array in batch]


def loss_and_gradients(model, batch, **kwargs):
    model.zero_grad()
    loss = model(*tensors(batch), **kwargs)[1]
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def reference_loss(model, data, numbers, offset='answer'):
    """Sum and count of the supervised losses, a row at a time, from full logits: an independent computation."""
    ids, meta = data
    total, count = 0.0, 0
    for n in numbers:
        row = torch.from_numpy(ids[meta['start'][n]:meta['end'][n]].astype(np.int64))
        first = 1 if offset == 'start' else meta[offset][n] - meta['start'][n]
        logits = model(row[None])[0][0]
        total = total + F.cross_entropy(logits[first - 1:-1], row[first:], reduction='sum')
        count += len(row) - first
    return total, count


@pytest.mark.parametrize('packing', [True, False])
def test_golden_targets(data, packing):
    """The supervised targets, decoded, are each answer and one end-of-text; every pad and prompt is IGNORE."""
    train = data('train')
    numbers = np.arange(5)
    x, y, positions, segments = make_batch(train, numbers, packing, block_size=128)
    answers = []
    for row, segment in zip(y, segments):
        for s in range(1, segment.max() + 1) if packing else [0]:
            answers.append(get_tokenizer().decode(row[(segment == s) & (row != IGNORE)].tolist()))
    ids, meta = train
    expected = [get_tokenizer().decode(ids[a:e].tolist()) for a, e in zip(meta['answer'][:5], meta['end'][:5])]
    assert sorted(answers) == sorted(expected) and all(text.count('<|endoftext|>') == 1 for text in answers)
    assert (y == EOS).sum() == 5 and (y[segments == -1] == IGNORE).all()
    if not packing:
        assert answers == expected  # rows keep their order
        for n in range(5):
            first = np.flatnonzero(y[n] != IGNORE)[0]
            assert y[n][first] == ids[meta['answer'][n]] and x[n][first] == ids[meta['answer'][n] - 1]  # neither early nor late
            assert (y[n] != IGNORE).sum() == meta['end'][n] - meta['answer'][n]


def test_an_oracle_has_no_loss_and_a_copier_does(data):
    x, y, _, _ = make_batch(data('train'), range(8), packing=False)
    keep = y != IGNORE
    following = np.concatenate([x[:, 1:], np.full((len(x), 1), EOS)], axis=1)
    assert (following[keep] == y[keep]).all()  # the next token of the input is the target
    assert (x[keep] != y[keep]).mean() > 0.8


@pytest.mark.parametrize('loss_on, offset', [('answer', 'answer'), ('response', 'header'), ('all', 'start')])
@pytest.mark.parametrize('block_size', [1024, 128])
def test_packed_equals_one_by_one(model, data, loss_on, offset, block_size):
    """Loss and every gradient, in fp64, for one row and several, against rows that never met."""
    train = data('train')
    numbers = np.random.default_rng(0).permutation(len(train[1]['start']))[:9]
    packed = make_batch(train, numbers, True, loss_on, block_size)
    assert len(packed[0]) == (1 if block_size == 1024 else len(packed[0])) < 9
    loss, gradients = loss_and_gradients(model, packed)
    model.zero_grad()
    total, count = reference_loss(model, train, numbers, offset)
    (total / count).backward()
    assert (packed[1] != IGNORE).sum() == count
    assert loss == pytest.approx((total / count).item(), rel=1e-12)
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-10, atol=1e-14)


def test_packed_rows_are_full_and_even(data):
    """No row is much shorter than another, which would be padded to the longest's length; and all examples are there."""
    train = data('train')
    lengths, n = train[1]['end'] - train[1]['start'], train[1]['examples']
    for block_size in (128, 200, 1024):
        _, _, _, segments = make_batch(train, range(n), True, block_size=block_size)
        filled = (segments >= 0).sum(1)
        assert segments.shape[1] <= block_size and filled.max() - filled.min() <= lengths.max()
        assert sum(row.max() for row in segments) == n and len(filled) <= 1.2 * lengths.sum() / block_size + 1


def test_packed_equals_unpacked_in_fp32(model, data):
    model, train = model.float(), data('train')
    one, gradients = loss_and_gradients(model, make_batch(train, range(8), True))
    two, others = loss_and_gradients(model, make_batch(train, range(8), False)[:3])
    assert one == pytest.approx(two, rel=1e-6)
    for a, b in zip(gradients, others):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_without_a_shared_prefix(model, data):
    ids, meta = data('train')
    own = ids, {**meta, 'shared_prefix': 0}
    x, *_ = packed = make_batch(own, range(6), True)
    assert x.shape[1] > make_batch((ids, meta), range(6), True)[0].shape[1]
    assert loss_and_gradients(model, packed)[0] == pytest.approx(loss_and_gradients(model, make_batch(own, range(6), False)[:3])[0])


def test_naive_packing_is_another_function(model, data):
    """The same rows with all in one segment, plainly causal: what this project must never do."""
    train = data('train')
    x, y, positions, segments = make_batch(train, range(8), True)
    right = loss_and_gradients(model, (x, y, positions, segments))[0]
    naive = loss_and_gradients(model, (x, y, positions, np.zeros_like(segments)))[0]
    assert abs(right - naive) > 1e-3


def test_attention_of_segments():
    """Any segments, in two rows at once, against sums over each query's keys."""
    torch.manual_seed(0)
    rows = [[0] * 5 + [1] * 40 + [2] * 3 + [3] * 45 + [-1] * 7, [1] * 40 + [2] * 60, [0] * 100, list(range(100)),
            [0] * 3 + [1] * 40 + [2] * 20 + [0] * 2 + [1] * 35, [1, 2] * 20 + [3] * 40 + [1] * 20]
    for segments in torch.tensor(list(zip(rows, rows[1:] + rows[:1]))):
        q, k, v = torch.randn(3, 2, 4, 100, 8, dtype=torch.float64)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=segment_mask(segments))
        for b, t in np.ndindex(2, 100):
            keys = [s for s in range(t + 1) if segments[b, s] in (0, segments[b, t])]
            weights = torch.einsum('hc,hsc->hs', q[b, :, t], k[b, :, keys]).div(8 ** 0.5).softmax(1)
            torch.testing.assert_close(found[b, :, t], torch.einsum('hs,hsc->hc', weights, v[b, :, keys]))


def test_padding_does_not_leak(model, data):
    x, y, positions, segments = make_batch(data('train'), [0], True)
    alone, gradients = loss_and_gradients(model, (x, y, positions, segments))
    pad = [(0, 0), (0, 37)]
    padded = np.pad(x, pad, constant_values=EOS), np.pad(y, pad, constant_values=IGNORE), np.pad(positions, pad), \
        np.pad(segments, pad, constant_values=-1)
    loss, others = loss_and_gradients(model, padded)
    assert loss == pytest.approx(alone, rel=1e-12)
    for a, b in zip(gradients, others):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_pad_heavy_batches_are_finite(model, data):
    """A row of one example beside a row of ten: no query is left without a key."""
    train = data('train')
    batch = make_batch(train, range(11), True, block_size=int((train[1]['end'] - train[1]['start']).max()) + 20)
    assert (batch[3] == -1).any()
    loss, gradients = loss_and_gradients(model, batch)
    assert np.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize('size', [1, 3, 8])
@pytest.mark.parametrize('packing', [True, False])
def test_evaluation_does_not_depend_on_the_batch_size(model, data, size, packing):
    """Sums over batches, a short last one included, divided once: FACTS' mean of means."""
    train = data('train')
    numbers = np.arange(11)
    total = sum(model(*tensors(make_batch(train, numbers[i:i + size], packing))[:4 if packing else 3], loss_reduction='sum')[1].item()
                for i in range(0, 11, size))
    reference, count = reference_loss(model, train, numbers)
    assert total / count == pytest.approx((reference / count).item(), rel=1e-9)


@pytest.mark.parametrize('micro', [1, 2, 8])
def test_accumulation_is_one_step(model, data, micro):
    """8x1, 4x2, 1x8: gradients equal to 1e-6 in fp32, also after clipping, with rows of unequal length."""
    model, train = model.float(), data('train')
    numbers = np.arange(8)
    whole, gradients = loss_and_gradients(model, make_batch(train, numbers))
    model.zero_grad()
    count = (make_batch(train, numbers)[1] != IGNORE).sum()
    parts = [model(*tensors(make_batch(train, chunk)), loss_reduction='sum')[1] / count for chunk in np.array_split(numbers, micro)]
    for part in parts:
        part.backward()
    assert sum(parts).item() == pytest.approx(whole, rel=1e-6)
    for clip in (None, 0.5):
        if clip:
            for p in model.parameters():
                p.grad = p.grad.clone()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
            gradients = [g * clip / norm for g in gradients]
        for p, g in zip(model.parameters(), gradients):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_many_supervised_tokens_in_chunks(model, data, monkeypatch):
    """More supervised positions than logits are held for at once: the same loss and gradients."""
    import model as module
    train = data('train')
    batch = make_batch(train, range(8), True, 'all')
    loss, gradients = loss_and_gradients(model, batch)
    monkeypatch.setattr(module, 'LOGITS_CHUNK', 50)
    chunked, others = loss_and_gradients(model, batch)
    assert chunked == pytest.approx(loss, rel=1e-9)
    for a, b in zip(gradients, others):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_many_supervised_tokens_under_autocast(model, data, monkeypatch):
    import model as module
    model, batch = model.float(), make_batch(data('train'), range(8), True, 'all')
    with torch.autocast('cpu', torch.bfloat16):
        loss, gradients = loss_and_gradients(model, batch)
        monkeypatch.setattr(module, 'LOGITS_CHUNK', 50)
        chunked, others = loss_and_gradients(model, batch)
    assert chunked == pytest.approx(loss, rel=1e-5)
    for a, b in zip(gradients, others):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * a.abs().max().item())


def test_each_loss_row_by_row(model, data):
    train = data('val')
    numbers = range(3)
    batch = tensors(make_batch(train, numbers, packing=False))[:3]
    losses = model(*batch, loss_reduction='none')[1].split((batch[1] != IGNORE).sum(1).tolist())
    for n, part in zip(numbers, losses):
        total, count = reference_loss(model, train, [n])
        assert len(part) == count and part.sum().item() == pytest.approx(total.item(), rel=1e-6)


def test_dropout_is_off_in_evaluation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, dropout=0.5))
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


def test_prompts_encode_apart(data):
    """In some rows a merge would cross from prompt to answer; in none of the files does one."""
    encode, apart = get_tokenizer().encode_ordinary, set()
    crossing = 0
    for row in ROWS:
        ids = encode_prompt(row) + encode(row['output']) + [EOS]
        crossing += ids[:-1] != encode(get_tokenizer().decode(ids[:-1]))
        apart.add(tuple(ids))
    assert crossing > 0
    for split in SPLITS:
        ids, meta = data(split)
        assert all(tuple(ids[start:end].tolist()) in apart for start, end in zip(meta['start'], meta['end']))


def test_initialisation():
    """GPT-2's: 0.02, 0.01 for positions, residual projections over the square root of their number, biases zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=2, n_embd=128, block_size=512))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std['wte.weight'] == pytest.approx(0.02, rel=0.03) and std['wpe.weight'] == pytest.approx(0.01, rel=0.03)
    assert std['h.3.attn.c_attn.weight'] == pytest.approx(0.02, rel=0.03)
    for matrix in ('attn', 'mlp'):
        assert std[f'h.3.{matrix}.c_proj.weight'] == pytest.approx(0.02 / 16 ** 0.5, rel=0.03)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith('bias'))
    assert all((p == 1).all() for name, p in model.named_parameters() if 'ln_' in name and name.endswith('weight'))


def test_parameters_of_the_four_sizes():
    from dataclasses import replace
    with torch.device('meta'):
        for count, layers, heads, width in ((124439808, 12, 12, 768), (354823168, 24, 16, 1024), (774030080, 36, 20, 1280),
                                            (1557611200, 48, 25, 1600)):
            model = GPT(replace(GPTConfig(), n_layer=layers, n_head=heads, n_embd=width))
            assert sum(p.numel() for p in model.parameters()) == count
