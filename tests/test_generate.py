"""Generation: batches, the cache and the scheduling change nothing about the answers."""
import math

import pytest
import torch

import model as model_module
from batch import IGNORE
from config import UserError
from model import GPT, GPTConfig

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


def test_rows_that_outgrow_the_memory_are_computed_anew(model, prompts, monkeypatch):
    monkeypatch.setattr(model_module, 'STEP', 4)  # so that the room which admission leaves is used up many times
    admissions = []
    admit = model_module.Cache.admit
    monkeypatch.setattr(model_module.Cache, 'admit', lambda *args: admissions.append(len(args[1])) or admit(*args))
    expected = [naive(model, p) for p in prompts]
    assert model.generate(prompts, NEW, eos=-1, cache_bytes=2 * 3 * 64 * 4 * 100) == expected  # 100 positions
    assert sum(admissions) > len(prompts) + 1  # more than once each, and the prefix


def test_small_packs_and_spans(model, prompts, monkeypatch):
    expected = [naive(model, p) for p in prompts]
    monkeypatch.setattr(model_module, 'PACK', 16)
    monkeypatch.setattr(model_module, 'SPAN', 3)
    assert model.generate(prompts, NEW, eos=-1) == expected


@torch.no_grad()
def test_cached_logits_equal_uncached(model, prompts, monkeypatch):
    rows = [p for p in prompts if len(p) + 5 <= BLOCK]
    cache = model_module.Cache(model, PREFIX, 1e9)
    logits = cache.admit(rows)
    for _ in range(5):
        for row, got in zip(rows, logits):
            torch.testing.assert_close(got, model(torch.tensor([row]))[0][0, -1], atol=1e-4, rtol=0)
            assert got.isfinite().all()
        rows = [row + [int(got.argmax())] for row, got in zip(rows, logits)]
        logits = cache.step(rows)


@torch.no_grad()
def test_double_precision(model, prompts):
    double = GPT(model.config).double()
    double.load_state_dict(model.state_dict())
    logits = model_module.Cache(double, PREFIX, 1e9).admit(prompts[:3])
    expected = torch.stack([double(torch.tensor([p]))[0][0, -1] for p in prompts[:3]])
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('autocast', [False, True])
def test_bfloat16(model, prompts, autocast):
    half = GPT(model.config)
    half.load_state_dict(model.state_dict())
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        answers = (half if autocast else half.bfloat16()).generate(prompts, NEW, eos=-1)
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


def test_samples_follow_the_probabilities(model, prompts):
    """First ids of 2,000 seeds against softmax, and none that top_k leaves out."""
    logits = torch.tensor([[1.0, 3.0, -1.0, 2.0]]).expand(2000, 4)
    uniform = [(i + 0.5) / 2000 for i in range(2000)]
    for top_k, kept in ((0, [0, 1, 2, 3]), (2, [1, 3])):
        counts = torch.bincount(torch.tensor(model_module.pick(logits, 0.7, top_k, uniform)), minlength=4) / 2000
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
    with pytest.raises(UserError, match='prompt 1 has'):
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
def test_gradients_are_those_of_plain_autograd(model, prompts, monkeypatch, supervised):
    """wte's gradient, as embedding and as output layer, over two micro-batches; the last block, where all is asked of it."""
    ids = torch.tensor([prompts[3], prompts[3][::-1]])
    targets = ids[:, 1:].clone()
    targets[:, :5] = IGNORE
    gradients = []
    for plain in (False, True):
        other = GPT(model.config).double()
        other.load_state_dict(model.state_dict())
        if plain:
            monkeypatch.setattr(model_module.TiedEmbedding, 'apply', lambda wte, idx: (torch.nn.functional.embedding(idx, wte), wte))
        for row, target in zip(ids, targets):
            if supervised and not plain:
                loss = other(row[None, :-1], target[None])[1]
            else:
                loss = torch.nn.functional.cross_entropy(other(row[None, :-1])[0][0], target)
            loss.backward()
        gradients.append({name: p.grad for name, p in other.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-10, rtol=1e-10, msg=name)


def test_gradients_do_not_depend_on_the_threads():
    """Several threads add to the same rows of wte, which the prompts share, in the same order every time."""
    draw = torch.Generator().manual_seed(0)
    ids, rows = torch.randint(9, (1, 600), generator=draw), torch.randn(1, 600, 768, generator=draw)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(4)
    for _ in range(10):
        wte = torch.zeros(9, 768, requires_grad=True)
        tokens, weight = model_module.TiedEmbedding.apply(wte, ids)
        ((tokens * rows).sum() + (weight * rows[0, :9]).sum()).backward()
        found.append(wte.grad)
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)
    expected = torch.stack([rows[0, i] + rows[0, ids[0] == i].double().sum(0) for i in range(9)])
    torch.testing.assert_close(found[0].double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('gelu', [False, True])
@pytest.mark.parametrize('positions', [37, model_module.SLOTS + 1])
def test_the_linear_layer_of_generation(gelu, positions):
    """oneDNN's product, taken in inference mode, is MKL's, and its GELU OpenAI's; in all other cases it is not taken."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((1, positions, 96), (160, 96), (160,)))

    def expected(y):
        y = y.double()
        return (0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3))) if gelu else y).float()

    whole, unbiased = expected(x @ weight.t() + bias), expected(x @ weight.t())
    torch.testing.assert_close(model_module.linear(x, weight, bias, gelu), whole, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model_module.linear(x, weight, bias, gelu), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model_module.linear(x, weight, gelu=gelu), unbiased, atol=1e-5, rtol=1e-5)
        with torch.autocast('cpu', torch.bfloat16):
            assert model_module.linear(x, weight, bias, gelu).dtype == torch.bfloat16
        double = model_module.linear(x.double(), weight.double(), bias.double(), gelu)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), whole, atol=1e-5, rtol=1e-5)
