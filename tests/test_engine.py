"""engine.py: batches, the cache, the scheduler and the precision change nothing about the answers that GPT.generate defines."""
import copy
import functools
import gc
import os
import platform
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import engine
from engine import (
    Engine,
    InferenceEmbedding,
    InferenceLinear,
    KVCache,
    Scheduler,
    Sequence,
    choose_ids,
    for_inference,
    generate,
)
from model import GPT, GPTConfig, ModelError, TiedEmbedding, sample_token

import pytest
import torch
from conftest import ROOT
from test_load import write_safetensors

BLOCK = 64
VOCAB = 97
NEW = 20
PREFIX = [5, 6, 7, 8]
CONFIG = GPTConfig(block_size=BLOCK, vocab_size=VOCAB, n_layer=3, n_head=4, n_embd=64)
GREEDY = {}
SAMPLED = {'temperature': 1.0, 'seed': 3}
TOP_4 = {'temperature': 0.7, 'top_k': 4, 'seed': 5}
CPU = torch.device('cpu')
POSITION_BYTES = 2 * CONFIG.n_layer * CONFIG.n_embd * 4  # of the keys and values of a position, in fp32


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)  # confident and varied answers, and biases that are not 0
    return model


@pytest.fixture(scope='module')
def prompts():
    """Prompts of many lengths in no order, one with a single id after the prefix, some that reach block_size."""
    draw = torch.Generator().manual_seed(1)
    lengths = 1, 9, 3, 30, 17, 55, 2, 40, 9, 59
    return [PREFIX + torch.randint(VOCAB, (length,), generator=draw).tolist() for length in lengths]


@pytest.fixture(scope='module')
def defined(model):
    """defined(prompt, new, **settings) -> the new ids of GPT.generate."""
    @functools.cache
    def remembered(prompt, new, settings):
        return model.generate(list(prompt), new, **dict(settings))

    def defined(prompt, new=NEW, eos=-1, **settings):
        return remembered(tuple(prompt), new, tuple((settings | {'eos': eos}).items()))
    return defined


# --- generate


@pytest.mark.parametrize('settings', [GREEDY, SAMPLED, TOP_4], ids=['greedy', 'sampled', 'top_4'])
@pytest.mark.parametrize('cache_bytes', [1, 3e5, 4e9])
@pytest.mark.parametrize('has_prefix', [True, False])
def test_a_batch_gives_the_ids_of_the_definition(model, prompts, defined, has_prefix, cache_bytes, settings):
    if not has_prefix:
        prompts = [prompt[4:] for prompt in prompts]
    expected = [defined(prompt, **settings) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 5
    assert generate(model, prompts, NEW, eos=-1, cache_bytes=cache_bytes, **settings) == expected


@pytest.mark.parametrize('cache_bytes', [1, 2e5, 4e9])
def test_answers_that_end_at_differing_times(model, prompts, defined, cache_bytes):
    everything = [defined(prompt) for prompt in prompts]
    eos = max(range(VOCAB), key=lambda id: len({ids.index(id) for ids in everything if id in ids}))
    expected = [defined(prompt, eos=eos) for prompt in prompts]
    assert len({len(ids) for ids in expected}) >= 4
    assert generate(model, prompts, NEW, eos=eos, cache_bytes=cache_bytes) == expected


def test_block_size_ends_an_answer(model, prompts, defined):
    answers = generate(model, prompts, BLOCK, eos=-1)
    assert [len(prompt) + len(ids) for prompt, ids in zip(prompts, answers)] == [BLOCK] * len(prompts)
    assert answers == [defined(prompt, BLOCK) for prompt in prompts]


def test_end_of_text_is_not_part_of_an_answer(model, prompts, defined):
    ids = defined(prompts[1])
    assert generate(model, prompts[1:2], NEW, eos=ids[0]) == [[]]  # at once
    # at the last id: shorter than max_new_tokens, so the caller sees that it ended by itself
    last = next(n for n in range(1, NEW) if ids[n] not in ids[:n])
    assert generate(model, prompts[1:2], last + 1, eos=ids[last]) == [ids[:last]]


@pytest.mark.parametrize('top_k', [0, 5])
def test_samples_depend_on_seed_and_prompt_alone(model, prompts, top_k):
    def sample(prompts, **more):
        return generate(model, prompts, NEW, temperature=1.0, top_k=top_k, eos=-1, **more)

    expected = sample(prompts)
    assert sample(prompts[::-1])[::-1] == expected
    assert sample(prompts, cache_bytes=1) == expected
    assert [sample([prompt])[0] for prompt in prompts] == expected
    assert sample(prompts, seed=1) != expected
    assert sample(prompts, seed=-1) != expected
    assert generate(model, prompts, NEW, eos=-1) != expected


def test_each_prompt_may_have_a_seed_of_its_own(model, prompts, defined):
    asked = [prompts[1]] * 4 + [prompts[3]]
    seeds = [7, 8, 9, 7, 7]
    expected = [defined(prompt, temperature=1.0, seed=seed) for prompt, seed in zip(asked, seeds)]
    assert generate(model, asked, NEW, 1.0, seed=seeds, eos=-1) == expected
    assert len({tuple(ids) for ids in expected}) == 4  # the same prompt and seed, the same answer


def test_the_likeliest_of_one_is_greedy(model, prompts):
    expected = generate(model, prompts, NEW, eos=-1)
    assert generate(model, prompts, NEW, temperature=0.9, top_k=1, eos=-1) == expected
    assert generate(model, prompts, NEW, temperature=1e-9, eos=-1) == expected


def test_on_done_is_called_once_for_each_answer_as_it_ends(model, prompts):
    done = []
    answers = generate(model, prompts, NEW, eos=-1, on_done=lambda i, ids: done.append((i, list(ids))))
    assert sorted(done) == list(enumerate(answers))
    lengths = [len(ids) for _, ids in done]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]  # all begin together: the shortest answer is out first


def test_a_single_prompt_equal_prompts_and_none(model, prompts, defined):
    for prompt in prompts:
        assert generate(model, [prompt], NEW, eos=-1) == [defined(prompt)]
    assert generate(model, [[3]], NEW, eos=-1) == [defined([3])]
    assert generate(model, prompts[1:2] * 4, NEW, eos=-1) == [defined(prompts[1])] * 4
    assert generate(model, [], NEW) == []
    assert generate(model, prompts, 0) == [[] for _ in prompts]


@pytest.mark.parametrize('bad, said', [
    ([], 'prompt 1 has 0 tokens; it may have 1 to 63'), ([1] * BLOCK, 'prompt 1 has 64 tokens'),
    ([1, VOCAB], 'prompt 1 has ids from 1 to 97; the model has 0 to 96'), ([-1, 1], 'prompt 1 has ids from -1 to 1')])
def test_prompts_that_cannot_be_answered_are_named_before_anything_is_computed(model, prompts, bad, said):
    done = []
    with pytest.raises(ModelError, match=said):
        generate(model, [prompts[0], bad], NEW, on_done=lambda *found: done.append(found))
    assert not done
    assert len(generate(model, [[1] * (BLOCK - 1)], NEW, eos=-1)[0]) == 1


def test_the_model_is_left_as_it_was(model, prompts):
    dropout = GPT(GPTConfig(**vars(CONFIG) | {'dropout': 0.5}))
    dropout.load_state_dict(model.state_dict())
    before = [list(prompt) for prompt in prompts]
    assert generate(dropout.train(), prompts, NEW, eos=-1) == generate(model, prompts, NEW, eos=-1)  # no dropout meanwhile
    assert dropout.training and not model.training and prompts == before

    def stop(i, ids):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        generate(dropout, prompts, NEW, eos=-1, on_done=stop)
    assert dropout.training
    dropout(torch.tensor(prompts[:1])).sum().backward()  # training goes on


@pytest.mark.parametrize('broken', [float('nan'), float('inf')])
def test_broken_weights_raise_an_error_instead_of_an_answer(model, prompts, broken):
    other = copy.deepcopy(model)
    other.h[1].mlp.c_fc.bias.data[3] = broken
    for settings in GREEDY, SAMPLED:
        with pytest.raises(ModelError, match='its weights are broken'):
            generate(other, prompts, NEW, **settings)


def test_ids_that_the_tokenizer_lacks_are_cut_at_loading(tmp_path):
    """A model that says ids beyond GPT-2's: one of an added token, or of the padding up to a multiple of 64."""
    vocab_size = 50304
    torch.manual_seed(0)
    talker = GPT(GPTConfig(block_size=32, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8))
    talker.ln_f.bias.data = 5 * torch.randn(8).sign()
    talker.wte.weight.data[50257:] = talker.ln_f.bias.data / 5
    write_safetensors(tmp_path, talker)
    whole = GPT.from_pretrained(tmp_path)
    assert set(generate(whole, [[1, 2, 3]], 5, eos=-1)[0]) <= set(range(50257, vocab_size))
    cut = GPT.from_pretrained(tmp_path, vocab_size=50257)
    assert cut.config.vocab_size == 50257 and torch.equal(cut.wte.weight, whole.wte.weight[:50257])
    for settings in GREEDY, SAMPLED, {'temperature': 50.0}:
        answers = generate(cut, [[1, 2, 3], [4, 5]], 8, eos=-1, **settings)
        assert max(max(ids) for ids in answers) < 50257
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(cut(ids), whole(ids)[:, :, :50257])


# --- sequences that join and leave between steps


class Recorded(Engine):
    """An Engine that remembers how many ids each step computed, and checks what it promises of each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes = []

    def compute(self, batch):
        sizes = [n_ids for _, n_ids in batch]
        assert min(sizes) >= 1 and sum(sizes) <= self.scheduler.step_size
        assert len(batch) <= self.scheduler.max_running
        longest = max(sequence.limit for sequence, _ in batch)
        assert len(batch) == 1 or len(batch) * longest <= self.scheduler.max_positions
        # all but the last are computed up to their end
        assert all(sequence.n_cached + n_ids == len(sequence.ids) for sequence, n_ids in batch[:-1])
        self.sizes.append(sizes)
        return super().compute(batch)


def run_to_the_end(model, prompts, **kwargs):
    """Greedy answers of a Recorded of these settings -> (the new ids of each prompt, the sizes of its steps)."""
    running = Recorded(model, **kwargs)
    sequences = [Sequence(CONFIG, prompt, NEW, eos=-1) for prompt in prompts]
    for sequence in sequences:
        running.add(sequence)
    while running.has_work():
        running.step()
    return [sequence.new_ids for sequence in sequences], running.sizes


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('step_size', [7, 1024])
def test_sequences_that_join_and_leave_at_any_time_get_the_ids_of_the_definition(model, prompts, defined, seed, step_size):
    """
    Thirty sequences of different settings, with the prefix and without, in random order: they join at random times, some are taken
    out, and the memory of the cache is sometimes enough for few of them only.
    """
    draw = random.Random(seed)
    cache_bytes = draw.choice([1, 2.5 * BLOCK * POSITION_BYTES, 4e9])
    running = Recorded(model, PREFIX, cache_bytes, max_running=6, step_size=step_size)
    others = [prompt[4:] for prompt in prompts]
    expected = {}
    waiting = []
    for _ in range(30):
        prompt = draw.choice(prompts + others)
        settings = draw.choice([GREEDY, SAMPLED, TOP_4])
        new = draw.randrange(1, NEW)
        sequence = Sequence(CONFIG, prompt, new, eos=-1, **settings)
        expected[sequence] = defined(prompt, new, **settings)
        waiting.append(sequence)
    removed = []
    ended = []
    while waiting or running.has_work():
        for _ in range(min(len(waiting), draw.choice([0, 0, 1, 1, 2, 5]))):
            running.add(waiting.pop())
        here = running.scheduler.running + list(running.scheduler.waiting)
        if here and draw.random() < 0.03:
            sequence = draw.choice(here)
            running.remove(sequence)
            removed.append(sequence)
            assert sequence.new_ids == expected[sequence][:len(sequence.new_ids)]
        complete, logits = running.step()
        assert len(complete) == (len(logits) if complete else 0)
        for sequence in complete:
            assert sequence.new_ids == expected[sequence][:len(sequence.new_ids)]
            if sequence.finish_reason:
                assert sequence.finish_reason == 'length'
                ended.append(sequence)
    assert len(ended) + len(removed) == 30 and len(removed) > 0 and len(ended) > 10
    assert all(sequence.new_ids == expected[sequence] for sequence in ended)


@pytest.mark.parametrize('removed', [0, 1, 2, 3, 4])
def test_a_removal_while_the_last_one_is_in_its_prompt(model, prompts, defined, removed):
    """It stays the last: otherwise the next step would take it for one that decodes."""
    running = Recorded(model, step_size=9, max_running=8)
    asked = [prompts[2], prompts[1][4:], prompts[0], prompts[6], prompts[5]]
    sequences = [Sequence(CONFIG, prompt, NEW, eos=-1) for prompt in asked]
    for sequence in sequences:
        running.add(sequence)
    while not 0 < sequences[4].n_cached < sequences[4].n_prompt - 10:
        running.step()
    assert running.scheduler.running == sequences
    running.remove(sequences[removed])
    sequences.pop(removed)
    asked.pop(removed)
    while running.has_work():
        running.step()
    assert [sequence.new_ids for sequence in sequences] == [defined(prompt, len(sequence.new_ids)) for prompt, sequence in zip(asked, sequences)]
    assert [sequence.finish_reason for sequence in sequences] == ['length'] * 4


def test_all_that_decode_get_an_id_in_every_step_while_a_long_prompt_is_read(model, prompts):
    running = Recorded(model, step_size=10, max_running=8)
    short = [Sequence(CONFIG, prompt, BLOCK, eos=-1) for prompt in (prompts[0], prompts[2], prompts[6])]
    for sequence in short:
        running.add(sequence)
    while not all(sequence.new_ids for sequence in short):
        running.step()
    long = Sequence(CONFIG, prompts[9], 1, eos=-1)
    running.add(long)
    n_steps = 0
    while not long.new_ids:
        before = [len(sequence.ids) for sequence in short]
        running.step()
        assert [len(sequence.ids) for sequence in short] == [length + 1 for length in before]
        n_steps += 1
    assert n_steps == 9  # 63 ids of its prompt, seven in each step


@pytest.mark.parametrize('step_size', [5, 16, 64])
def test_a_prompt_may_be_read_in_pieces(model, prompts, defined, step_size):
    answers, sizes = run_to_the_end(model, prompts, step_size=step_size, max_running=4)
    assert answers == [defined(prompt) for prompt in prompts]
    assert max(map(sum, sizes)) == step_size


def test_what_prompts_begin_with_is_computed_once(model, prompts, defined):
    """Some begin with the prefix, some do not, and one is the prefix itself, whose last id must be computed."""
    asked = [*prompts, prompts[3][4:], PREFIX, PREFIX[:2] + [9]]
    answers, sizes = run_to_the_end(model, asked, prefix=PREFIX)
    assert answers == [defined(prompt) for prompt in asked]
    n_ids = sum(map(sum, sizes))
    n_new = sum(len(ids) - 1 for ids in answers)  # the last new id of each is never computed
    assert n_ids == sum(map(len, asked)) - 4 * len(prompts) + n_new


def test_sequences_that_do_not_fit_wait(model, prompts, defined, monkeypatch):
    """The cache never has room for more than three at their full length, and slots are used again."""
    monkeypatch.setattr(engine, 'CACHE_GROWTH', 4)  # so that the cache grows many times
    longest_first = sorted(prompts, key=len, reverse=True)
    answers, sizes = run_to_the_end(model, longest_first, cache_bytes=3.5 * POSITION_BYTES * BLOCK)
    assert answers == [defined(prompt) for prompt in longest_first]
    n_running = [len(step) for step in sizes]
    assert n_running[0] == 3 and max(n_running) < 6 and len(sizes) > 2 * NEW  # not all at once


def test_a_sequence_that_no_cache_could_hold_runs_alone(model, prompts):
    scheduler = Scheduler(max_running=8, max_positions=10, step_size=99, prefix=[])
    sequences = [Sequence(CONFIG, prompt, NEW) for prompt in prompts[:3]]
    scheduler.waiting.extend(sequences)
    batch, joined = scheduler.schedule()
    assert joined == sequences[:1] and batch == [(sequences[0], 5)]


def test_the_cache_is_no_longer_than_its_sequences_may_become(model, monkeypatch):
    monkeypatch.setattr(engine, 'CACHE_GROWTH', 4)
    running = Engine(model)
    lengths = []
    for n_prompt, new in (5, 3), (5, 9), (BLOCK - 3, 2), (5, 3):
        running.add(Sequence(CONFIG, [1] * n_prompt, new, eos=-1))
        while running.has_work():
            running.step()
            lengths.append(running.cache.layers[0].size(3))
    assert lengths == [8] * 3 + [8] * 4 + [13] * 5 + [BLOCK - 1] * 2 + [8] * 3
    assert running.cache.layers[0].size(1) == 1


def test_a_waiting_sequence_can_be_taken_out(model, prompts, defined):
    running = Engine(model, cache_bytes=1)
    sequences = [Sequence(CONFIG, prompt, NEW, eos=-1) for prompt in prompts[:3]]
    for sequence in sequences:
        running.add(sequence)
    running.step()
    running.remove(sequences[1])
    while running.has_work():
        running.step()
    assert [sequence.new_ids for sequence in sequences] == [defined(prompts[0]), [], defined(prompts[2])]
    assert running.step() == ([], None)  # there is nothing to do


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_the_logits_of_a_step_are_those_of_the_whole_sequence(model, prompts, dtype, tolerance):
    plain = copy.deepcopy(model).to(dtype)
    running = Engine(plain, PREFIX, step_size=24, max_running=16)
    for prompt in prompts[:7]:
        running.add(Sequence(CONFIG, prompt, 6, eos=-1))
    while running.has_work():
        complete, logits = running.step()
        for sequence, its_logits in zip(complete, logits):
            before = sequence.ids[:-1]
            torch.testing.assert_close(its_logits, plain(torch.tensor([before]))[0, -1], atol=tolerance, rtol=0)


# --- how an id is drawn


def numbers(*values):
    """A random generator that draws these."""
    values = iter(values)
    return SimpleNamespace(random=lambda: next(values))


@pytest.mark.parametrize('top_k, kept', [(0, [0, 1, 2, 3]), (2, [1, 3]), (9, [0, 1, 2, 3])])
def test_samples_follow_the_probabilities(top_k, kept):
    """2,000 equally spaced numbers against softmax, and none that top_k leaves out."""
    logits = torch.tensor([1.0, 3.0, -1.0, 2.0])
    drawn = [sample_token(logits, 0.7, top_k, numbers((i + 0.5) / 2000)) for i in range(2000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=4) / 2000
    expected = torch.zeros(4)
    expected[kept] = (logits[kept] / 0.7).softmax(0)
    torch.testing.assert_close(counts, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize('top_k', [0, 3])
def test_a_random_number_that_rounds_to_1_draws_an_id_that_exists(top_k):
    """The largest number below 1 is 1 in fp32: an id with a probability is chosen, not one past the vocabulary."""
    logits = torch.tensor([0.0, 1.0, 2.0, 1.5, -1.0])
    for number in 1 - 2 ** -53, 1 - 2 ** -30, 0.0:
        chosen = sample_token(logits, 1.0, top_k, numbers(number))
        assert 0 <= chosen < 5 and (not top_k or chosen in (1, 2, 3))


def test_sequences_of_a_step_draw_by_their_own_settings():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1)
    sequences = [SimpleNamespace(temperature=temperature, top_k=0, rng=numbers(number))
                 for temperature, number in ((0.0, 0.5), (1.0, 0.999), (1.0, 1e-9))]
    assert choose_ids(logits, sequences) == [2, 0, 2]


# --- precision and kernels of inference


def inference_copy(model, dtype):
    return for_inference(copy.deepcopy(model), CPU, dtype)


@pytest.mark.parametrize('has_onednn', [True, False])
@pytest.mark.parametrize('mkl_rows', [0, 3])  # those of AMD's and of Intel's processors
def test_inference_in_fp32_gives_the_ids_of_the_definition(model, prompts, defined, has_onednn, mkl_rows, monkeypatch):
    monkeypatch.setattr(engine, 'HAS_ONEDNN', has_onednn and engine.HAS_ONEDNN)
    monkeypatch.setattr(engine, 'MKL_ROWS', mkl_rows)
    fast = inference_copy(model, torch.float32)
    for settings in GREEDY, TOP_4:
        assert generate(fast, prompts, NEW, eos=-1, **settings) == [defined(prompt, **settings) for prompt in prompts]
    assert fast.generate(prompts[1], NEW, eos=-1) == defined(prompts[1])
    assert not any(p.requires_grad for p in fast.parameters()) and not fast.training


@pytest.mark.parametrize('dtype, has_kernels', [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float16, False)])
def test_inference_in_half_precision_is_close(model, prompts, defined, dtype, has_kernels, monkeypatch):
    monkeypatch.setattr(engine, 'HAS_ONEDNN', has_kernels and engine.HAS_ONEDNN)
    monkeypatch.setattr(engine, 'HAS_FBGEMM', has_kernels and engine.HAS_FBGEMM)
    half = inference_copy(model, dtype)
    assert half.ln_f.weight.dtype == half.wpe.weight.dtype == torch.float32
    close = 0.06 if dtype == torch.bfloat16 else 0.008
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits = half(ids)
        scale = model(ids).std()
        assert (logits.float() - model(ids)).abs().max() < close * scale
    answers = generate(half, prompts, NEW, eos=-1)
    assert [len(ids) for ids in answers] == [min(NEW, BLOCK - len(prompt)) for prompt in prompts]
    first = [ids[:1] == defined(prompt)[:1] for prompt, ids in zip(prompts, answers)]
    assert sum(first) >= 9
    losses = [net(torch.tensor([prompts[3]]), torch.tensor([prompts[3]]), loss_reduction='none') for net in (model, half)]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[0].mean(), losses[1].mean(), rtol=0.01, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('has_autocast', [True, False])
def test_models_that_are_trained_in_half_precision_answer_too(model, prompts, defined, has_autocast, dtype):
    """With autocast, as train.py shows answers, and with all weights in half."""
    half = copy.deepcopy(model) if has_autocast else copy.deepcopy(model).to(dtype)
    with torch.autocast('cpu', dtype, enabled=has_autocast):
        answers = generate(half, prompts, NEW, eos=-1)
    assert [len(ids) for ids in answers] == [min(NEW, BLOCK - len(prompt)) for prompt in prompts]
    first = [ids[:1] == defined(prompt)[:1] for prompt, ids in zip(prompts, answers)]
    assert sum(first) > len(prompts) // 2


def test_no_matrix_is_cast_while_half_precision_decodes(model, prompts):
    """Under autocast, in inference mode, all of them would be, for every token."""
    def largest_cast(model, steps):
        """How many elements the largest tensor has that these steps of four sequences cast or copy."""
        running = Engine(model)
        for prompt in prompts[:4]:
            running.add(Sequence(CONFIG, prompt, 12, eos=-1))
        running.step()
        with torch.profiler.profile(record_shapes=True) as profile:
            for _ in range(steps):
                running.step()
        shapes = [event.input_shapes[0] for event in profile.events() if event.name in ('aten::_to_copy', 'aten::copy_')]
        return max(torch.Size(shape).numel() for shape in shapes)

    for dtype in torch.bfloat16, torch.float16:
        assert largest_cast(inference_copy(model, dtype), 10) < CONFIG.n_embd ** 2
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        assert largest_cast(model, 1) >= CONFIG.n_embd ** 2  # the instrument sees such casts


@pytest.mark.skipif(not engine.HAS_FBGEMM, reason='needs FBGEMM: x86 with AVX2')
def test_in_float16_nothing_but_the_matrices_is_rounded(model, prompts):
    """An fp32 model of rounded matrices computes the same; states, sums, biases and norms are exact."""
    rounded = copy.deepcopy(model)
    for name, p in rounded.named_parameters():
        if p.dim() == 2 and name != 'wpe.weight':
            p.data = p.data.half().float()
    half = inference_copy(model, torch.float16)
    ids = torch.tensor([prompts[3]])
    difference = (half(ids) - rounded(ids)).abs().max()
    assert difference < 1e-3 and difference < (half(ids) - model(ids)).abs().max() / 20
    assert generate(half, prompts, NEW, eos=-1) == [rounded.generate(prompt, NEW, eos=-1) for prompt in prompts]


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='reads /proc, and needs malloc_trim')
def test_half_precision_takes_half_the_memory():
    """Of the process: FBGEMM's matrices are not seen as tensors. In a shape of Small's proportions."""
    def resident():
        gc.collect()
        engine.return_freed_memory()
        return int(Path('/proc/self/statm').read_text().split()[1]) * 4096

    config = GPTConfig(block_size=64, vocab_size=8000, n_layer=4, n_head=4, n_embd=512)
    sizes = {}
    for dtype in 2 * [torch.float32, torch.bfloat16, torch.float16]:  # the first time, libraries are loaded
        before = resident()
        ready = for_inference(GPT(config), CPU, dtype)
        generate(ready, [[1, 2, 3]], 2)
        sizes[dtype] = resident() - before
        del ready
    weights = 4 * sum(p.numel() for p in GPT(config).parameters())
    assert 0.9 * weights < sizes[torch.float32] < 1.1 * weights
    assert max(sizes[torch.bfloat16], sizes[torch.float16]) <= 0.55 * sizes[torch.float32], sizes


def test_bfloat16_on_a_processor_without_its_instructions():
    """oneDNN's product in bfloat16 refuses to run there; F.linear does not."""
    code = ('import torch; from engine import *; from model import *\n'
            'model = for_inference(GPT(GPTConfig(16, 50, 1, 2, 32)), torch.device("cpu"), torch.bfloat16)\n'
            'print(generate(model, [[1, 2], [3]], 4, eos=-1))')
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=os.environ | {'ONEDNN_MAX_CPU_ISA': 'AVX2'}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize('has_onednn, has_amx', [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize('rows', [(1, 1), (2, 1), (2, 37), (2, 300)])
def test_the_linear_layers_of_inference_are_the_plain_ones(has_onednn, has_amx, rows, monkeypatch):
    monkeypatch.setattr(engine, 'HAS_ONEDNN', has_onednn and engine.HAS_ONEDNN)
    monkeypatch.setattr(engine, 'HAS_AMX', has_amx)
    draw = torch.Generator().manual_seed(0)
    plain = torch.nn.Linear(96, 160).requires_grad_(False)
    x = torch.randn(*rows, 96, generator=draw)
    tokens = TiedEmbedding(50, 96).requires_grad_(False)
    for dtype, close in (torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-1):
        torch.testing.assert_close(InferenceEmbedding(tokens, dtype).unembed(x).float(), tokens.unembed(x), atol=close, rtol=1e-2)
    fast = InferenceLinear(plain.weight, plain.bias, torch.float32)
    torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)
    for dtype, close in (torch.float16, 1e-3), (torch.bfloat16, 1e-2):
        half = InferenceLinear(plain.weight, plain.bias, dtype)
        torch.testing.assert_close(half(x).float(), plain(x), atol=close, rtol=close)
    double = InferenceLinear(plain.weight, plain.bias, torch.float64)
    torch.testing.assert_close(double(x), copy.deepcopy(plain).double()(x.double()), atol=1e-12, rtol=1e-12)


def test_a_cache_that_grows_and_shrinks_keeps_what_is_in_it():
    cache = KVCache(CONFIG, CPU, torch.float32)
    cache.resize(2, 3, 10)
    for layer in cache.layers:
        layer.copy_(torch.randn(layer.shape))
    before = [layer.clone() for layer in cache.layers]
    length = before[0].size(3)
    cache.resize(5, length + 1, 90)
    cache.copy(1, 4)
    cache.resize(5, 3, 4)
    for layer, was in zip(cache.layers, before):
        kept = min(layer.size(3), length)
        assert torch.equal(layer[:, :2, :, :kept], was[:, :, :, :kept]) and torch.equal(layer[:, 4], layer[:, 1])
