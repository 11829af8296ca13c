"""Generation: batches, the cache and the scheduling change nothing about the answers."""
from types import SimpleNamespace

import pytest
import torch

import model as model_module
from model import GPT, IGNORE, GPTConfig, ModelError

BLOCK, VOCAB, NEW = 64, 97, 20
PREFIX = [5, 6, 7, 8]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=VOCAB, n_layer=3, n_head=4, n_embd=64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)  # confident and varied answers, and biases that are not 0
    return model


@pytest.fixture(scope='module')
def prompts():
    """Prompts of many lengths in no order, one with a single id after the prefix, some that reach block_size."""
    draw = torch.Generator().manual_seed(1)
    return [PREFIX + torch.randint(VOCAB, (n,), generator=draw).tolist() for n in (1, 9, 3, 30, 17, 55, 2, 40, 9, 59)]


@torch.no_grad()
def naive(model, prompt, new=NEW, eos=-1):
    """Greedy, one prompt, all of it anew for every token."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + new, BLOCK):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        if ids[-1] == eos:
            return ids[len(prompt):-1]
    return ids[len(prompt):]


@pytest.mark.parametrize('prefix', [True, False])
@pytest.mark.parametrize('cache_bytes', [1, 3e5, 4e9])
def test_batch_equals_one_by_one_without_cache(model, prompts, prefix, cache_bytes):
    prompts = prompts if prefix else [p[4:] for p in prompts]
    expected = [naive(model, p) for p in prompts]
    assert len({tuple(ids) for ids in expected}) > 5
    assert model.generate(prompts, NEW, eos=-1, cache_bytes=cache_bytes) == expected


@pytest.mark.parametrize('cache_bytes', [1, 2e5, 4e9])
def test_rows_end_at_differing_times(model, prompts, cache_bytes):
    everything = [naive(model, p) for p in prompts]
    eos = max(range(VOCAB), key=lambda id: len({ids.index(id) for ids in everything if id in ids}))
    expected = [naive(model, p, eos=eos) for p in prompts]
    assert len({len(ids) for ids in expected}) >= 4
    assert model.generate(prompts, NEW, eos=eos, cache_bytes=cache_bytes) == expected


def rows_of(prompts, limit=BLOCK):
    """-> rows as generate makes them, the longest first."""
    config = GPTConfig(block_size=BLOCK, vocab_size=VOCAB)
    return [model_module.Row(config, p, limit, eos=-1) for p in sorted(prompts, key=len, reverse=True)]


def test_rows_that_do_not_fit_wait(model, prompts, monkeypatch):
    """With room for three rows at their full length, no more are ever in the cache, and slots are used again."""
    monkeypatch.setattr(model_module, 'CACHE_GROWTH', 4)  # so that the cache grows many times
    sizes = []
    decode_step = model_module.KVCache.decode_step
    monkeypatch.setattr(model_module.KVCache, 'decode_step', lambda self: sizes.append(len(self.rows)) or decode_step(self))
    expected = [naive(model, p) for p in prompts]
    position_bytes = 2 * 3 * 64 * 4  # keys and values of 3 layers, 64 channels, fp32
    assert model.generate(prompts, NEW, eos=-1, cache_bytes=3.5 * position_bytes * (BLOCK - 4)) == expected
    assert max(sizes) == 3 and len(sizes) > 2 * NEW  # not all at once


def test_the_cache_is_no_longer_than_its_rows_may_become(model, monkeypatch):
    monkeypatch.setattr(model_module, 'CACHE_GROWTH', 4)
    config, lengths = GPTConfig(block_size=BLOCK, vocab_size=VOCAB), []
    cache = model_module.KVCache(model, [])
    for prompt_size, new in ((5, 3), (5, 9), (BLOCK - 3, 2), (5, 3)):
        cache.step([model_module.Row(config, [1] * prompt_size, new, eos=-1)])
        while cache.rows:
            lengths.append(cache.kv_cache[0].size(3))
            cache.step([])
    assert lengths == [8] * 2 + [8] * 4 + [13] * 4 + [BLOCK - 1] + [8] * 2


def test_small_chunks(model, prompts, monkeypatch):
    expected = [naive(model, p) for p in prompts]
    monkeypatch.setattr(model_module, 'PREFILL_CHUNK', 16)
    assert model.generate(prompts, NEW, eos=-1) == expected


@torch.no_grad()
def test_cached_logits_equal_uncached(model, prompts):
    rows = rows_of([p for p in prompts if len(p) + 5 <= BLOCK])
    cache = model_module.KVCache(model, PREFIX)
    assert cache.P == 4
    logits = cache.prefill(rows)
    for _ in range(5):
        for row, got in zip(rows, logits):
            torch.testing.assert_close(got, model(torch.tensor([row.ids]))[0][0, -1], atol=1e-4, rtol=0)
            assert got.isfinite().all()
            row.ids.append(int(got.argmax()))
        logits = cache.decode_step()


@torch.no_grad()
def test_rows_join_and_leave_between_steps(model, prompts):
    """The machinery that generate schedules: prefill beside rows that decode, evict from the middle."""
    rows = rows_of(prompts[:6])
    cache = model_module.KVCache(model, PREFIX)
    latest = {}

    def feed(batch, logits):
        for row, got in zip(batch, logits):
            torch.testing.assert_close(got, model(torch.tensor([row.ids]))[0][0, -1], atol=1e-4, rtol=0)
            row.ids.append(int(got.argmax()))
            latest[id(row)] = len(row.ids)

    feed(rows[:2], cache.prefill(rows[:2]))
    feed(list(cache.rows), cache.decode_step())
    feed(rows[2:5], cache.prefill(rows[2:5]))
    cache.evict(rows[1])
    cache.evict(rows[4])  # the last slot
    feed(list(cache.rows), cache.decode_step())
    feed(rows[5:], cache.prefill(rows[5:]))
    feed(list(cache.rows), cache.decode_step())
    assert {id(row) for row in cache.rows} == {id(rows[i]) for i in (0, 2, 3, 5)} and len(latest) == 6


@torch.no_grad()
def test_rows_that_join_one_by_one_with_settings_of_their_own(model, prompts):
    """serve.py's use: whatever else runs, a row gets the ids that generate gives it alone; its slot is used again."""
    settings = [dict(temperature=0.0), dict(temperature=1.0, seed=3), dict(temperature=0.7, top_k=4), dict(temperature=0.0)] * 3
    rows = [model_module.Row(model.config, p, NEW - i, eos=-1, **s) for i, (p, s) in enumerate(zip(prompts * 2, settings))]
    cache, waiting, sizes = model_module.KVCache(model, PREFIX), list(rows), set()
    while waiting or cache.rows:
        joining = [waiting.pop(0)] if waiting and len(cache.rows) < 4 else []
        batch, logits = cache.step(joining)
        assert logits.shape == (len(batch), VOCAB) and batch == (joining or batch)
        sizes.add(cache.kv_cache[0].size(1))
    assert max(sizes) == 4
    for i, (row, p, s) in enumerate(zip(rows, prompts * 2, settings)):
        assert row.answer == model.generate([p], NEW - i, eos=-1, **s)[0] and row.finish_reason == 'length'


@torch.no_grad()
def test_double_precision(model, prompts):
    double = GPT(model.config).double()
    double.load_state_dict(model.state_dict())
    rows = rows_of(prompts[:3])
    logits = model_module.KVCache(double, PREFIX).prefill(rows)
    expected = torch.stack([double(torch.tensor([row.ids]))[0][0, -1] for row in rows])
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision(model, prompts, autocast, dtype):
    half = GPT(model.config)
    half.load_state_dict(model.state_dict())
    with torch.autocast('cpu', dtype, enabled=autocast):
        answers = (half if autocast else half.to(dtype)).generate(prompts, NEW, eos=-1)
    assert [len(ids) for ids in answers] == [min(NEW, BLOCK - len(p)) for p in prompts]
    first = [naive(model, p, 1) for p in prompts]
    assert sum(a[:1] == b for a, b in zip(answers, first)) > len(prompts) // 2


def test_block_size_ends_a_row(model, prompts):
    answers = model.generate(prompts, BLOCK, eos=-1)
    assert [len(p) + len(ids) for p, ids in zip(prompts, answers)] == [BLOCK] * len(prompts)
    assert answers == [naive(model, p, BLOCK) for p in prompts]


def test_end_of_text_is_not_part_of_an_answer(model, prompts):
    ids = naive(model, prompts[1])
    assert model.generate(prompts[1:2], NEW, eos=ids[0]) == [[]]  # at once
    # at the last id: shorter than max_new_tokens, so the caller sees that it ended by itself
    last = next(n for n in range(1, NEW) if ids[n] not in ids[:n])
    assert model.generate(prompts[1:2], last + 1, eos=ids[last]) == [ids[:last]]


@pytest.mark.parametrize('top_k', [0, 5])
def test_samples_depend_on_seed_and_prompt_alone(model, prompts, top_k):
    def sample(prompts, **more):
        return model.generate(prompts, NEW, temperature=1.0, top_k=top_k, eos=-1, **more)

    expected = sample(prompts)
    assert sample(prompts[::-1])[::-1] == expected
    assert sample(prompts, cache_bytes=1) == expected
    assert [sample([p])[0] for p in prompts] == expected
    assert sample(prompts, seed=1) != expected
    assert expected != model.generate(prompts, NEW, eos=-1)


def sample_tokens(logits, temperature, top_k, numbers):
    """model.py's, of rows that draw these numbers."""
    rows = [SimpleNamespace(temperature=temperature, top_k=top_k, rng=SimpleNamespace(random=lambda number=number: number))
            for number in numbers]
    return model_module.sample_tokens(logits, rows)


def test_samples_follow_the_probabilities(model, prompts):
    """First ids of 2,000 seeds against softmax, and none that top_k leaves out."""
    logits = torch.tensor([[1.0, 3.0, -1.0, 2.0]]).expand(2000, 4)
    numbers = [(i + 0.5) / 2000 for i in range(2000)]
    for top_k, kept in ((0, [0, 1, 2, 3]), (2, [1, 3])):
        counts = torch.bincount(torch.tensor(sample_tokens(logits, 0.7, top_k, numbers)), minlength=4) / 2000
        expected = torch.zeros(4)
        expected[kept] = (logits[0, kept] / 0.7).softmax(0)
        torch.testing.assert_close(counts, expected, atol=1e-3, rtol=0)


def test_top_1_is_greedy(model, prompts):
    assert model.generate(prompts, NEW, temperature=0.9, top_k=1, eos=-1) == model.generate(prompts, NEW, eos=-1)


def test_on_done_is_called_once_a_row_as_it_ends(model, prompts):
    done = []
    answers = model.generate(prompts, NEW, eos=-1, on_done=lambda i, ids: done.append((i, list(ids))))
    assert sorted(done) == list(enumerate(answers))
    lengths = [len(ids) for _, ids in done]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]  # all begin together: the shortest answer is out first


def test_one_prompt_equal_prompts_and_none(model, prompts):
    for p in prompts:
        assert model.generate([p], NEW, eos=-1) == [naive(model, p)]
    assert model.generate([[3]], NEW, eos=-1) == [naive(model, [3])]
    assert model.generate(prompts[1:2] * 4, NEW, eos=-1) == [naive(model, prompts[1])] * 4
    assert model.generate([], NEW) == []
    assert model.generate(prompts, 0) == [[] for _ in prompts]


@pytest.mark.parametrize('bad', [[], [1] * BLOCK])
def test_prompts_without_ids_or_room(model, prompts, bad):
    with pytest.raises(ModelError, match='prompt 1 has'):
        model.generate([prompts[0], bad], NEW)
    assert len(model.generate([[1] * (BLOCK - 1)], NEW, eos=-1)[0]) == 1


def test_model_is_left_as_it_was(model, prompts):
    dropout = GPT(GPTConfig(block_size=BLOCK, vocab_size=VOCAB, n_layer=3, n_head=4, n_embd=64, dropout=0.5))
    dropout.load_state_dict(model.state_dict())
    before = [list(p) for p in prompts]
    assert dropout.train().generate(prompts, NEW, eos=-1) == model.generate(prompts, NEW, eos=-1)  # no dropout meanwhile
    assert dropout.training and not model.training and prompts == before

    def stop(i, ids):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        dropout.generate(prompts, NEW, eos=-1, on_done=stop)
    assert dropout.training
    dropout(torch.tensor(prompts[:1]))[0].sum().backward()  # training goes on


@pytest.mark.parametrize('supervised', [True, False])
def test_gradients_are_those_of_full_logits(model, prompts, supervised):
    """wte's gradient, as embedding and as output layer, over two micro-batches; with and without targets."""
    ids = torch.tensor([prompts[3], prompts[3][::-1]])
    targets = ids[:, 1:].clone()
    targets[:, :5] = IGNORE
    gradients = []
    for plain in (False, True):
        other = GPT(model.config).double()
        other.load_state_dict(model.state_dict())
        for row, target in zip(ids, targets):
            if supervised and not plain:
                loss = other(row[None, :-1], target[None])[1]
            else:
                loss = torch.nn.functional.cross_entropy(other(row[None, :-1])[0][0], target)
            loss.backward()
        gradients.append({name: p.grad for name, p in other.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-10, rtol=1e-10, msg=name)


def test_gradients_do_not_depend_on_the_run(model):
    """Several threads add to the same rows of wte, which all prompts share: in the same order every time."""
    draw, threads, found = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    ids = torch.randint(9, (8, 60), generator=draw)
    torch.set_num_threads(4)
    for _ in range(10):
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        found.append(model.wte.weight.grad.clone())
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize('positions', [37, model_module.MAX_ROWS + 1])
@pytest.mark.parametrize('onednn', [True, False])
def test_the_linear_layer_of_generation(positions, onednn, monkeypatch):
    """oneDNN's product, taken in inference mode, is MKL's; in other cases it is not taken."""
    calls = []
    product = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, '_linear_pointwise', lambda *args: calls.append(1) or product(*args))
    monkeypatch.setattr(model_module, 'ONEDNN', onednn and model_module.ONEDNN)
    draw, linear = torch.Generator().manual_seed(0), model_module.linear
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((1, positions, 96), (160, 96), (160,)))

    unbiased = (x.double() @ weight.t().double()).float()
    whole = unbiased + bias
    torch.testing.assert_close(linear(x, weight, bias), whole, atol=1e-5, rtol=1e-5)
    assert not calls
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, bias), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(linear(x, weight), unbiased, atol=1e-5, rtol=1e-5)
        assert bool(calls) == (onednn and positions <= model_module.MAX_ROWS and torch.backends.mkldnn.is_available())
        calls.clear()
        with torch.autocast('cpu', torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
        double = linear(x.double(), weight.double(), bias.double())
        assert double.dtype == torch.float64 and not calls
        torch.testing.assert_close(double.float(), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('top_k', [0, 3])
def test_a_uniform_number_that_rounds_to_1(top_k):
    """The largest number below 1 is 1 in fp32: the last id with a probability is chosen, not one past the vocabulary."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.5, -1.0]]).repeat(3, 1)
    chosen = sample_tokens(logits, 1.0, top_k, [1 - 2 ** -53, 1 - 2 ** -30, 0.0])
    assert all(0 <= i < 5 for i in chosen) and chosen[2] == (2 if top_k else 0)


@pytest.mark.parametrize('cache_bytes', [1, 4e5, 4e9])
@pytest.mark.parametrize('chunk', [16, 1024])
def test_samples_of_a_prompt_prefill_it_once(model, prompts, monkeypatch, cache_bytes, chunk):
    """The rows are those of as many calls with other seeds; the prompts' positions are computed once."""
    monkeypatch.setattr(model_module, 'PREFILL_CHUNK', chunk)
    expected = [model.generate(prompts, NEW, 1.0, seed=3 + n, eos=-1) for n in range(4)]
    positions, ended = [], {}
    prefill_chunk = model_module.KVCache.prefill_chunk
    monkeypatch.setattr(model_module.KVCache, 'prefill_chunk', lambda self, slots: (
        positions.extend(len(self.rows[slot].ids) - self.P for slot in slots) or prefill_chunk(self, slots)))
    rows = model.generate(prompts, NEW, 1.0, seed=3, eos=-1, cache_bytes=cache_bytes, samples=4, on_done=lambda i, ids: ended.update({i: ids}))
    assert rows == [answers[i] for i in range(len(prompts)) for answers in expected] == [ended[i] for i in range(4 * len(prompts))]
    assert len({tuple(ids) for ids in rows}) > 35
    assert sorted(positions) == sorted([len(PREFIX)] + [len(prompt) - len(PREFIX) for prompt in prompts])


@torch.no_grad()
def test_equal_rows_that_join_get_the_logits_of_one(model, prompts):
    rows = rows_of([prompts[0], prompts[1], prompts[1], prompts[2], prompts[1]])
    cache = model_module.KVCache(model, PREFIX)
    cache.prefill(rows_of(prompts[4:5]))
    for row, got in zip(rows, cache.prefill(rows)):
        torch.testing.assert_close(got, model(torch.tensor([row.ids]))[0][0, -1], atol=1e-4, rtol=0)
        row.ids.append(7)
    cache.rows[0].ids.append(7)
    for row, got in zip(list(cache.rows), cache.decode_step()):
        torch.testing.assert_close(got, model(torch.tensor([row.ids]))[0][0, -1], atol=1e-4, rtol=0)
