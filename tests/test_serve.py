"""serve.py as its users meet it: the packages openai and ollama, our own judge.py, and clients that misbehave."""
import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import serve
from engine import generate
from model import GPT, GPTConfig
from prepare import encode_prompt, get_tokenizer
from sample import response_text

import ollama
import openai
import pytest
import requests
import torch
from conftest import ROOT, Started, stage

SHAPE = dict(block_size=1024, n_layer=2, n_head=2, n_embd=64)
SCRIPT = ['\n', '{"', 'score', '":', ' 7', '}', '<|endoftext|>']  # what one of the models always says
CHAT = '/v1/chat/completions'
QUESTIONS = [f'Describe {word} in {n} words, please.' for n, word in enumerate('the sea;a café;bread 🍞;rain and wind;it'.split(';'))]


def random_model():
    """Confident answers that differ from prompt to prompt."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(**SHAPE))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(8 if name.startswith('h.') and p.dim() > 1 else 1)
    return model.eval()


def scripted_model():
    """A model whose MLP finds the last id in SCRIPT and adds the next one: the judge of judge.py."""
    torch.manual_seed(6)
    model = GPT(GPTConfig(**SHAPE))
    ids = [get_tokenizer().encode(text, allowed_special='all')[0] for text in SCRIPT]
    with torch.no_grad():
        for block in model.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.wpe.weight.zero_()
        directions = torch.nn.functional.normalize(model.wte.weight, dim=1) * 8
        model.wte.weight.copy_(directions)
        mlp = model.h[0].mlp
        for i, (now, then) in enumerate(zip(ids, ids[1:])):
            mlp.c_fc.weight[i], mlp.c_fc.bias[i] = 4 * directions[now], -200
            mlp.c_proj.weight[:, i] = directions[then]
        mlp.c_fc.weight[len(ids):].zero_()
    return model.eval()


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A folder whose out/ holds a run of the random model; it came from the scripted one."""
    folder = tmp_path_factory.mktemp('served')
    (folder / 'out').mkdir()
    for path, model, origin in (('out/tiny-sft', random_model(), str(folder / 'script.pth')), ('script', scripted_model(), 'scratch')):
        torch.save(model.state_dict(), folder / f'{path}.pth')
        (folder / f'{path}.json').write_text(json.dumps({
            'model': asdict(model.config), 'init_from': origin, 'config': {'seed': 1}, 'sha256': 'of no rows', 'step': 1, 'val_loss': 1.0}))
    return folder


@contextlib.contextmanager
def serving(folder, *flags, env=None, first=''):
    """serve.py in folder, after the Python code `first` -> its URL, and the process."""
    process = Started(folder, [ROOT / 'serve.py', '--port=0', *flags], env or {}, first)
    try:
        wait_until(lambda: ': http://' in process.output()[0], 60)
        yield process.output()[0].split()[-1], process
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope='module')
def server(run_folder):
    with serving(run_folder, '--max_new_tokens=900') as server:
        yield server


@pytest.fixture(scope='module')
def url(server):
    return server[0]


def expected(model, row, n=24, **settings):
    return response_text(generate(model, [encode_prompt(row)], n, **settings)[0])


def chat(url, text, **more):
    body = {'model': 'tiny-sft', 'messages': [{'role': 'user', 'content': text}], 'max_tokens': 24} | more
    return requests.post(url + CHAT, json=body, timeout=60)


def metric(url, name):
    return float(re.search(rf'^{name} (\S+)$', requests.get(url + '/metrics').text, re.MULTILINE)[1])


def wait_until(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


# --- answers


def test_answers_are_those_of_generate_whatever_else_runs(url):
    """Greedy and sampled, of two models, in both dialects, joining and leaving at all times: no answer is mixed up."""
    models = {'tiny-sft': random_model(), 'tiny-before': scripted_model()}
    draw, work = random.Random(0), []
    for i in range(60):
        row = {'instruction': draw.choice(QUESTIONS), 'input': draw.choice(['', 'Some input.'])}
        settings = draw.choice([{}, {'temperature': 1.0, 'seed': draw.randrange(9)}, {'temperature': 0.8, 'seed': 3, 'top_k': 5}])
        work.append((draw.choice(list(models)), row, draw.choice([1, 5, 40]), settings, i % 3))

    def ask(name, row, n, settings, dialect):
        if dialect == 0:
            return chat(url, row['instruction'], model=name, input=row['input'], max_tokens=n, **settings).json()['choices'][0]['message']['content']
        if dialect == 1:
            reply = chat(url, row['instruction'], model=name, input=row['input'], max_tokens=n, stream=True, **settings)
            lines = [json.loads(line[6:]) for line in reply.text.split('\n\n')[:-2]]
            return ''.join(line['choices'][0]['delta']['content'] for line in lines)
        body = {'model': name, 'prompt': row['instruction'], 'input': row['input'], 'options': {'num_predict': n, **settings}}
        lines = requests.post(url + '/api/generate', json=body).text.splitlines()
        return ''.join(json.loads(line)['response'] for line in lines)

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda one: ask(*one), work))
    answers = [expected(models[name], row, n, **{'seed': 123, **settings}) for name, row, n, settings, _ in work]
    assert found == [serve.mask(text) for text in answers] and len(set(answers)) > 15
    assert metric(url, 'active_rows') == metric(url, 'waiting_rows') == 0


def test_the_openai_package(url):
    client, model = openai.OpenAI(base_url=url + '/v1', api_key='none'), random_model()
    assert [one.id for one in client.models.list()] == ['tiny-sft', 'tiny-before']
    assert client.models.retrieve('tiny-before').id == 'tiny-before'
    messages, ids = [{'role': 'user', 'content': QUESTIONS[0]}], encode_prompt({'instruction': QUESTIONS[0]})
    new_ids = model.generate(ids, 12)
    reply = client.chat.completions.create(model='tiny-sft', messages=messages, max_tokens=12, logprobs=True, top_logprobs=3, n=2)
    assert [one.message.content for one in reply.choices] == [expected(model, {'instruction': QUESTIONS[0]}, 12)] * 2
    assert reply.choices[0].message.role == 'assistant' and reply.choices[1].index == 1
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 2 * len(new_ids))
    assert reply.choices[0].finish_reason == ('length' if len(new_ids) == 12 else 'stop')
    # log-probabilities, against the whole computed at once
    with torch.no_grad():
        logprobs = model(torch.tensor([ids + new_ids]))[0].log_softmax(1)[len(ids) - 1:-1]
    for token, new_id, row in zip(reply.choices[0].logprobs.content, new_ids, logprobs):
        assert bytes(token.bytes) == get_tokenizer().decode_single_token_bytes(new_id)
        assert abs(token.logprob - row[new_id]) < 1e-3 and abs(token.top_logprobs[0].logprob - row.max()) < 1e-3

    stream = client.chat.completions.create(model='tiny-sft', messages=messages, max_tokens=12, n=2, temperature=1.0, seed=4,
                                            stream=True, stream_options={'include_usage': True})
    texts, *chunks = ['', ''], *stream
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts == [serve.mask(expected(model, {'instruction': QUESTIONS[0]}, 12, temperature=1.0, seed=seed)) for seed in (4, 5)]
    assert chunks[-1].usage.completion_tokens > 0 and chunks[0].choices[0].delta.role == 'assistant'

    # a raw prompt is continued as it is
    raw = client.completions.create(model='tiny-sft', prompt='The sea is', max_tokens=9)
    assert raw.choices[0].text == get_tokenizer().decode(model.generate(get_tokenizer().encode('The sea is'), 9))
    some = client.completions.create(model='tiny-sft', prompt='The sea is', max_tokens=4, logprobs=2).choices[0].logprobs
    assert some.tokens[0] in some.top_logprobs[0] and len(some.top_logprobs[0]) == 2 and max(some.token_logprobs) <= 0
    bare = client.completions.create(model='tiny-sft', prompt='The sea is', max_tokens=4, logprobs=0).choices[0].logprobs
    assert bare.tokens == some.tokens and bare.top_logprobs == [{}] * 4
    # null is what was not sent; without a seed another answer comes each time
    null = {'max_tokens': None, 'max_completion_tokens': 5, 'temperature': None, 'stop': None, 'seed': None}
    assert chat(url, QUESTIONS[0], **null).json()['usage']['completion_tokens'] <= 5
    assert len({chat(url, QUESTIONS[0], temperature=5).text.partition('choices')[2] for _ in range(4)}) == 4
    with pytest.raises(openai.NotFoundError, match='tiny-sft, tiny-before'):
        client.models.retrieve('gpt-5')
    with pytest.raises(openai.NotFoundError, match='tiny-sft, tiny-before'):
        client.chat.completions.create(model='gpt-5', messages=messages)
    chunks = list(client.chat.completions.create(model='tiny-sft', messages=messages, max_tokens=12, stream=True))
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason in ('stop', 'length') and chunks[-1].choices[0].delta.content == ''  # clients drop a last text


def test_the_ollama_package(url):
    client = ollama.Client(url)
    assert requests.head(url).status_code == 200  # its command line asks so if a server runs
    assert [one.model for one in client.list().models] == ['tiny-sft', 'tiny-before']
    shown = client.show('tiny-sft')
    assert shown.details.family == 'gpt2' and '### Instruction:\n{{ .Prompt }}' in shown.template
    assert client.list().models[0].digest != client.list().models[1].digest
    answer = serve.mask(expected(random_model(), {'instruction': QUESTIONS[1]}, 12))
    reply = client.generate('tiny-sft:latest', QUESTIONS[1], options={'num_predict': 12, 'num_ctx': 4096})
    assert reply.response == answer and reply.done and reply.eval_count <= 12 and reply.total_duration > reply.eval_duration > 0
    *parts, last = client.chat('tiny-sft', [{'role': 'user', 'content': QUESTIONS[1]}], stream=True, options={'num_predict': 12})
    assert ''.join(part.message.content for part in [*parts, last]) == answer and last.done_reason in ('stop', 'length')
    assert client.chat('tiny-before', [{'role': 'user', 'content': 'x'}]).message.content == '{"score": 7}'
    assert client.generate('tiny-sft', '').done_reason == 'load'
    assert last.message.content == '' and not any(part.done for part in parts)
    assert [one.model for one in client.ps().models] == ['tiny-sft', 'tiny-before']
    assert client.generate('tiny-sft', QUESTIONS[1], options={'num_predict': 0}).response == ''
    told = client.generate('tiny-sft', QUESTIONS[1], logprobs=True, top_logprobs=2, options={'num_predict': 3})
    assert len(told.logprobs) == told.eval_count == len(told.logprobs[0].top_logprobs) + 1


@pytest.mark.parametrize('dialect', ['ollama', 'openai'])
def test_judge_py_asks_it(url, tmp_path, dialect):
    rows = [{'instruction': f'Say {n}.', 'input': '', 'output': str(n), 'model_response': 'one'} for n in range(3)]
    (tmp_path / 'answers.json').write_text(json.dumps(rows))
    stage(tmp_path, 'judge.py', f'--judge={dialect}', f'--judge_url={url}', '--judge_model=tiny-before', '--predictions=answers.json',
          '--calibrate=0')
    assert json.loads((tmp_path / 'out/scores.json').read_text())['summary']['run']['score']['value'] == 7


def test_earlier_turns_are_left_out_and_said_to_be(url):
    turns = [{'role': 'user', 'content': 'Hello.'}, {'role': 'assistant', 'content': 'Hi.'}, {'role': 'user', 'content': QUESTIONS[2]}]
    reply = chat(url, '', messages=turns)
    assert reply.headers['X-Messages-Left-Out'] == '2' and 'X-Messages-Left-Out' not in chat(url, QUESTIONS[2]).headers
    assert reply.json()['choices'] == chat(url, QUESTIONS[2]).json()['choices']


def test_system_messages_go_into_the_input(url):
    """As prepare.py reads chats: several are joined, before an input of the request's own; a header says so."""
    messages = [{'role': 'system', 'content': 'Be kind.'}, {'role': 'developer', 'content': [{'type': 'text', 'text': 'Be brief.'}]},
                {'role': 'user', 'content': QUESTIONS[0], 'name': 'ann'}]
    reply = chat(url, '', messages=messages, input='The sea.')
    assert reply.headers['X-System-In-Input'] == '2' and 'X-Messages-Left-Out' not in reply.headers
    right = expected(random_model(), {'instruction': QUESTIONS[0], 'input': 'Be kind.\n\nBe brief.\n\nThe sea.'})
    assert reply.json()['choices'][0]['message']['content'] == right
    body = {'prompt': QUESTIONS[0], 'system': 'Be kind.\n\nBe brief.\n\nThe sea.', 'stream': False, 'options': {'num_predict': 24}}
    reply = requests.post(url + '/api/generate', json=body)
    assert reply.json()['response'] == right and reply.headers['X-System-In-Input'] == '1'


def test_settings_that_are_not_built_are_named_in_a_header(url):
    """Values that change nothing are not; and what is named cannot break the header."""
    for more, named in (({'top_p': 0.5, 'tools': [{}], 'user\r\nX-Evil: 1': 'x'}, 'tools, top_p, user??X-Evil??1'),
                        ({'top_p': 1, 'presence_penalty': 0, 'tools': None, 'n': 1, 'response_format': {'type': 'text'}}, None),
                        ({'seed': 1, 'top_k': 3, 'stop': 'x', 'temperature': 1}, None)):
        assert chat(url, QUESTIONS[0], max_tokens=1, **more).headers.get('X-Ignored') == named
    body = {'prompt': 'Hello.', 'stream': False, 'n': 3, 'format': 'json', 'options': {'num_predict': 1, 'repeat_penalty': 1.3, 'top_p': 1}}
    assert requests.post(url + '/api/generate', json=body).headers['X-Ignored'] == 'format, n, repeat_penalty'


def test_stop_sequences(url):
    """The answer ends before the first, and a stream never shows the beginning of one."""
    whole = chat(url, QUESTIONS[3]).json()['choices'][0]['message']['content']
    stop = whole[len(whole) // 2:][:4]
    for more in ({'stop': stop}, {'stop': ['never there', stop]}):
        choice = chat(url, QUESTIONS[3], **more).json()['choices'][0]
        assert choice['message']['content'] == whole[:whole.index(stop)] and choice['finish_reason'] == 'stop'
        lines = chat(url, QUESTIONS[3], stream=True, **more).text.split('\n\n')[:-2]
        assert ''.join(json.loads(line[6:])['choices'][0]['delta']['content'] for line in lines) == whole[:whole.index(stop)]


def new_answer(stop=(), n_top=-1, limit=60, echo=False):
    """An Answer as a request makes it."""
    asked = SimpleNamespace(max_tokens=limit, temperature=0, top_k=0, seed=1, stop=stop, n_top=n_top, echo=echo, n=1)
    return serve.Answer(GPTConfig(), asked, [1], False, 0, SimpleNamespace(set=lambda: None))


def feed(answer, new_ids):
    """Let the answer get these ids, one after the other, each with itself as its record -> the Pieces that come."""
    pieces = []
    for new_id in new_ids:
        answer.append(new_id)
        answer.on_token(new_id)
        pieces.append(answer.take())
    return [piece for piece in pieces if piece]


def test_a_stream_of_an_answer_that_repeats_the_header(monkeypatch):
    """The header is dropped, as sample.py does, once it is whole; then each token comes once, with its piece of text."""
    monkeypatch.setattr(serve, 'chain', [])
    new_ids = get_tokenizer().encode('### Response:\nThe cat 🎉 sat') + [50256]
    pieces = feed(new_answer(n_top=0), new_ids)
    text = ''.join(piece.text for piece in pieces)
    assert text == 'The cat 🎉 sat' and sum((piece.tokens for piece in pieces), []) == new_ids[:-1] and len(pieces) > 3


def test_what_comes_while_a_piece_is_sent_is_not_lost():
    """Also if it ends the answer."""
    answer = new_answer()
    answer.changed = asyncio.Event()
    ids = get_tokenizer().encode('The sea is wide and deep, and so on.') + [50256]

    async def read():
        pieces = []
        feed_some(answer, ids[:4])
        async for piece in serve.stream_pieces([answer]):
            pieces.append(piece)
            if len(pieces) == 1:
                feed_some(answer, ids[4:])
        return pieces

    pieces = asyncio.run(read())
    assert ''.join(piece.text for piece in pieces) == 'The sea is wide and deep, and so on.'
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def feed_some(answer, new_ids):
    for new_id in new_ids:
        answer.append(new_id)
        answer.on_token(None)


# --- completions: lists of prompts, ids, log-probabilities of prompts


def completions(url, prompt, **more):
    return requests.post(url + '/v1/completions', json={'model': 'tiny-sft', 'prompt': prompt, **more}, timeout=60)


def test_lists_of_prompts_and_ids(url):
    """Texts or ids, one or several; n answers each, in order."""
    texts = ['The sea is', 'A cat']
    ids = [get_tokenizer().encode(text) for text in texts]
    alone = [completions(url, text, max_tokens=5).json()['choices'][0]['text'] for text in texts]
    for prompt in (texts, ids):
        choices = completions(url, prompt, max_tokens=5, n=2).json()['choices']
        assert [choice['text'] for choice in choices] == [alone[0]] * 2 + [alone[1]] * 2 and [choice['index'] for choice in choices] == [0, 1, 2, 3]
    assert completions(url, ids[1], max_tokens=5).json()['choices'][0]['text'] == alone[1]
    assert completions(url, texts, max_tokens=5).json()['usage'] == {'prompt_tokens': 5, 'completion_tokens': 10, 'total_tokens': 15}
    for wrong in ([50257], [-1], [], ' ', [[1], []]):
        assert completions(url, wrong).status_code == 400, wrong


@pytest.mark.parametrize('more', [{'max_tokens': 1}, {'max_tokens': 0}, {'max_tokens': 1, 'stream': True}])
def test_the_log_probabilities_of_prompts(url, more):
    """What lm-eval asks: echo, logprobs=1, lists of ids, of which some begin as the template does or are longer than a step."""
    prefix = encode_prompt({'instruction': 'Say it.'})
    prompts = [get_tokenizer().encode('The sea 🎉 is'), prefix, prefix[:25], [50256, 464], list(range(1000, 1700))]
    model = random_model()
    reply = completions(url, prompts, echo=True, logprobs=1, **more)
    if more.get('stream'):
        chunks = [json.loads(line[6:])['choices'][0] for line in reply.text.split('\n\n')[:-2]]
        choices = [next(chunk for chunk in chunks if chunk['index'] == i) for i in range(len(prompts))]
    else:
        choices = reply.json()['choices']
    for prompt, choice in zip(prompts, choices):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt]))[0].log_softmax(1)
        told = choice['logprobs']
        assert told['token_logprobs'][0] is told['top_logprobs'][0] is None
        n = len(prompt) + (more['max_tokens'] > 0)
        assert [len(told[key]) for key in ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset')] == [n] * 4
        right = logprobs[range(len(prompt) - 1), prompt[1:]].tolist()
        assert told['token_logprobs'][1:len(prompt)] == pytest.approx(right, abs=1e-3)
        for token, tops, row in zip(told['tokens'][1:], told['top_logprobs'][1:], logprobs):
            likeliest = get_tokenizer().decode([row.argmax().item()])
            is_shown = '\ufffd' in likeliest or serve.mask(likeliest) == likeliest
            assert token in tops and len(tops) <= 2 and (max(tops.values()) == pytest.approx(row.max().item(), abs=1e-3)) >= is_shown
        assert choice['text'].startswith(get_tokenizer().decode(prompt))
        if more['max_tokens'] == 0:
            assert choice['text'] == get_tokenizer().decode(prompt)


def test_where_nothing_is_generated_no_token_is_told(url):
    reply = chat(url, 'Count.', logprobs=True, top_logprobs=2, max_tokens=0).json()['choices'][0]
    assert reply['message']['content'] == '' and not (reply['logprobs'] or {}).get('content')


def test_a_prompt_of_one_token_has_no_probability(url):
    choice, = completions(url, 'Count', echo=True, logprobs=1, max_tokens=0).json()['choices']
    told = choice['logprobs']
    assert (choice['text'], told['tokens'], told['token_logprobs'], told['text_offset']) == ('Count', ['Count'], [None], [0])


def test_tokens_that_are_parts_of_characters(url):
    """Written as OpenAI writes them, so that no two alternatives have one name; offsets count whole characters."""
    prompt = 'a 🎉é b'
    told = completions(url, prompt, max_tokens=0, echo=True, logprobs=1).json()['choices'][0]['logprobs']
    parts = [get_tokenizer().decode_single_token_bytes(id) for id in get_tokenizer().encode(prompt)]
    assert told['tokens'] == [serve.token_record(id, 0)['token'] for id in get_tokenizer().encode(prompt)]
    assert told['tokens'][1:3] == ['bytes:\\x20\\xf0\\x9f', 'bytes:\\x8e']
    whole = [prompt.encode()[:sum(map(len, parts[:i]))].decode(errors='ignore') for i in range(len(parts))]
    assert told['text_offset'] == [len(text) for text in whole]


def test_nothing_is_generated_where_nothing_is_asked_for(url):
    assert chat(url, QUESTIONS[0], max_tokens=0).json()['choices'][0]['message']['content'] == ''
    reply = completions(url, 'The sea', max_tokens=0, echo=True).json()
    assert reply['choices'][0]['text'] == 'The sea' and reply['choices'][0]['finish_reason'] == 'length' and reply['usage']['completion_tokens'] == 0


def test_rows_without_an_input_are_examples_too(monkeypatch):
    """As are rows whose column family holds something else."""
    rows = [{'instruction': 'Name it.', 'family': ['a', 'list']}, {'instruction': 'Name a tree.'}, {'instruction': 'Name a tree.', 'input': 'x'}]
    monkeypatch.setattr(serve, 'read_split', lambda *of: SimpleNamespace(meta={'rows': rows, 'sha256': 'x'}))
    found = serve.page_examples({'config': {'dataset': 'mine'}, 'sha256': 'x'})
    assert found == [{'title': 'Name it.', 'instruction': 'Name it.', 'input': ''}, {'title': 'Name a tree.', 'instruction': 'Name a tree.', 'input': ''}]


# --- what is refused


@pytest.mark.parametrize('path, body, status, words', [
    (CHAT, '{', 400, 'not a complete JSON object'),
    (CHAT, '[' * 100_001, 413, '100,000'),
    (CHAT, '[' * 50_000, 400, 'not a complete JSON object'),
    (CHAT, '[[1, 2]]', 400, 'not a complete JSON object'),
    (CHAT, '["ab", "cd"]', 400, 'not a complete JSON object'),
    ('/api/chat', {'options': [[1, 2]]}, 400, 'not a complete JSON object'),
    ('/api/chat', {'messages': [{'role': 'user', 'content': 'x', 'images': ['aGk=']}]}, 400, 'images'),
    ('/api/generate', {'prompt': 'x', 'images': ['aGk=']}, 400, 'images'),
    (CHAT, 'x' * 1_000_000, 413, '100,000 bytes'),
    (CHAT, {'messages': []}, 400, 'no instruction'),
    (CHAT, {'messages': [{'role': 'assistant', 'content': 'x'}]}, 400, 'last message must have the role user'),
    (CHAT, {'messages': [{'role': 'system', 'content': 'x'}]}, 400, 'no instruction'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'temperature': -1}, 400, 'temperature'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'max_tokens': 'x'}, 400, 'max_tokens'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'n': 65}, 400, '65 answers are more than'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'n': 0}, 400, 'n: '),
    (CHAT, {'messages': [{'role': 'user', 'content': 'word ' * 1100}]}, 400, 'tokens; it may have'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'a' * 20_000}]}, 400, 'tokens; it may have'),
    (CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'x'}, {'type': 'image_url'}]}]}, 400, 'not a text'),
    ('/v1/completions', {'prompt': ' '}, 400, 'no instruction'),
    ('/api/chat', {'model': 'llama3', 'messages': [{'role': 'user', 'content': 'x'}]}, 404, "no model 'llama3'"),
    ('/api/generate', {'prompt': 'x', 'options': {'top_k': 'many'}}, 400, 'top_k'),
    ('/api/show', {'name': 'llama3'}, 404, 'llama3'),
    ('/api/pull', {'model': 'llama3'}, 404, 'Not Found'),
])
def test_refusals_are_clear_and_in_the_dialect(url, path, body, status, words):
    reply = requests.post(url + path, data=body if isinstance(body, str) else json.dumps(body))
    error = reply.json()['error']
    assert reply.status_code == status and words in (error if path.startswith('/api/') else error['message'])
    assert chat(url, QUESTIONS[0], max_tokens=1).ok


def test_odd_text_is_answered(url):
    for text in ('\0\1', '\ud800 alone', 'مرحبا', '🎉' * 40, '<|endoftext|>', '### Response:\n' * 5, ' x'):
        body = json.dumps({'messages': [{'role': 'user', 'content': text}], 'max_tokens': 3})
        assert requests.post(url + CHAT, data=body).status_code == 200, text
        assert completions(url, text, echo=True, max_tokens=1).status_code == 200, text


def test_ordinary_http_is_understood(url):
    """Bodies in chunks, HEAD, a host in capitals, Ollama's tag in a model's path; a seed below 0 draws anew."""
    for host in 'LOCALHOST', 'localhost.:80', '127.0.0.1:8000':
        assert requests.get(url + '/v1/models', headers={'Host': host}).ok
    assert requests.get(url + '/v1/models', headers={'Host': 'localhost.example'}).status_code == 403
    body = json.dumps({'messages': [{'role': 'user', 'content': 'Hi.'}], 'max_tokens': 1}).encode()
    assert requests.post(url + CHAT, data=iter([body[:9], body[9:]])).ok
    assert requests.post(url + CHAT, data=iter([b'x' * 60_000] * 3)).status_code == 413
    for path in ('/', '/health', '/api/tags', '/api/version', '/v1/models'):
        reply = requests.head(url + path)
        assert reply.status_code == 200 and not reply.content
    assert requests.get(url + '/v1/models/tiny-sft:latest').json()['id'] == 'tiny-sft'
    assert len({chat(url, QUESTIONS[0], temperature=5, seed=-1).text.partition('choices')[2] for _ in range(4)}) == 4


# --- filters


FILTER_CASES = [json.loads(line) for line in Path(ROOT, 'data/filter_cases.jsonl').read_text('utf-8').splitlines()]


def test_a_stream_shows_no_more_than_the_whole(monkeypatch):
    """At every length of a text, what is final is masked as it is in the whole text."""
    cases = [case['text'] for case in FILTER_CASES]
    draw = random.Random(1)
    texts = cases + ['\n'.join(draw.sample(cases, 2)) for _ in range(40)] + [' '.join(draw.sample(cases, 2)) for _ in range(40)] + [
        'MT84 MALT 0110 0001 2345 MTLC AST0 01S is hers', 'Call (030) 123 4567 or +49 (0) 30 1234567.', 'a@b.org', '4111 1111 1111 1111',
        'pay de89 3704 0044 0532 0130 00 and de89 3704 0044', 'xde89 1 4111 1111 1111 1111 12/27 5']
    # numbers with all that may stand between them
    numbers = ['4111 1111 1111 1111', '+49 30 1234567', '020 7946 0123', '(555) 123-4567', '0049 30 1234567', '0012345679', '1 000 000', '24', '12/27',
               'a@b.org', 'DE89 3704 0044 0532 0130 00', 'my number is', 'Then we go', '(Visa)', '’s', '**', '"', '1234']
    for _ in range(400):
        parts = [draw.choice(numbers) + draw.choice(['', ' ', ', ', '. ', ' - ', '; ', '! ', '** -', '" ', ', (']) for _ in range(draw.randint(1, 6))]
        texts.append(''.join(parts))
    for chain in (['pii', 'profanity'], ['pii']):
        monkeypatch.setattr(serve, 'chain', chain)
        for text in texts:
            whole = serve.mask(text)
            for size in range(len(text)):
                assert whole.startswith(serve.mask(text[:serve.final_size(text[:size])])), text[:size]


def test_a_prompt_that_has_no_room_is_refused_before_it_is_masked(monkeypatch):
    """The filters take seconds for the longest that a request may hold, in which nobody's answer would go on."""
    monkeypatch.setattr(serve, 'served', {'tiny': SimpleNamespace(model=random_model())})
    monkeypatch.setattr(serve, 'mask', lambda text, found=None: pytest.fail('it was masked'))
    asked = serve.GenerateRequest(model='tiny', messages=[{'role': 'user', 'content': 'DE89 ' * 19_000}])
    for call in lambda: serve.template_prompt(asked, {}, set()), lambda: serve.raw_prompt('1 ' * 48_000, asked, set()):
        with pytest.raises(serve.HTTPException) as error:
            call()
        assert 'tokens; it may have 1 to 1023' in error.value.detail


def test_a_stream_with_a_stop_sequence_shows_no_more_either(monkeypatch):
    monkeypatch.setattr(serve, 'chain', ['pii'])
    text = 'Write to bob@example.com or pay with 4111 1111 1111 1111 now, please.'
    for stop in ('#', '### End', 'a stop sequence of many words', 'please'):
        pieces = feed(new_answer([stop]), get_tokenizer().encode(text) + [50256])
        assert ''.join(piece.text for piece in pieces) == 'Write to [email] or pay with [card] now, ' + 'please.' * (stop != 'please')
        assert len(pieces) > 3  # it comes while it is written


@pytest.mark.parametrize('text, masked', [
    ('Write to jo.doe+x@mail.example.org.', 'Write to [email].'), ('Pay DE89 3704 0044 0532 0130 00 now', 'Pay [IBAN] now'),
    ('DE88 3704 0044 0532 0130 00', None), ('Card 4111-1111-1111-1111!', 'Card [card]!'), ('4111 1111 1111 1112', None),
    ('Ring +44 20 7946 0958 at 10', 'Ring [phone] at 10'), ('(555) 010-4567', '[phone]'), ('On 2024-05-17 at 12:30', None),
    ('3.14159265358979 and 1,234,567', None), ('You idiot!', 'You [offensive]!'), ('You 1d10t', 'You [offensive]'),
    ('Scunthorpe assesses class', None), ('A gay couple shut the door.', None), ('', None), ('An ignorant man waits 45s, then 455 more.', None),
    # what follows a number, or stands before it, is not part of it
    ('Card 4111 1111 1111 1111 12/27 123', 'Card [card] 12/27 123'), ('99 4111 1111 1111 1111', '99 [card]'), ('amex 3782 822463 10005 ok', 'amex [card] ok'),
    ('To ES91 2100 0418 4502 0005 1332 EUR 100', 'To [IBAN] EUR 100'), ('to es91 2100 0418 4502 0005 1332 100 eur', 'to [IBAN] 100 eur'),
    ('card 4111\u00a01111\u00a01111\u00a01111', 'card [card]'), ('DE89\u202f3704\u202f0044\u202f0532\u202f0130\u202f00.', '[IBAN].'),
    ('a card: 0.4111111111111111', None), ('4111111111111111x', None),
    # what only looks like one
    ('On 05/17/2024, 17.05.2024 or 17-05-2024.', None), ('Write 500-1000 words.', None), ('Add 512 345 6789.', None), ('Open 08.30-17.00.', None),
    ('It began at 1548138160707 and 1700000000.', None), ('ISBN 978-3-16-148410-0 or 0-306-40615-2', None), ('7-6, 3-6, 6-4', None),
    ('There were +1000000 views, then +1 000 000.', None), ('Lottery: 04 11 23 35 41 42', None), ('1 2 3 4 5 6 7 8 9 10 11 12 13', None),
    # a word before a bare number
    ('Call me at 555-0123.', 'Call me at [phone].'), ('The 555-0123 valve.', None), ('Tel.: 512 345 6789', 'Tel.: [phone]'), ('phone 5123456789', 'phone [phone]')])
def test_what_the_filters_mask(monkeypatch, text, masked):
    monkeypatch.setattr(serve, 'chain', ['pii', 'profanity'])
    found = set()
    right = text if masked is None else masked
    assert serve.mask(text, found) == right and found == set(re.findall(r'\[(\w+)\]', right))
    monkeypatch.setattr(serve, 'chain', [])
    assert serve.mask(text) == text


def test_a_long_hostile_text_is_filtered_in_time():
    for text in ('a' * 16_000, '1 ' * 8_000, 'a@' * 8_000, '0' * 16_000, 'A1' * 8_000, '+1 (' * 4_000, ('+' + '1' * 38 + 'x ') * 400, 'ab12 ' * 3_200,
                 '4111 ' * 3_200, 'call ' * 3_200, '01 ' * 5_000, 'a[at]' * 3_200):
        began = time.process_time()
        serve.mask(text)
        serve.final_size(text)
        assert time.process_time() - began < 1, text[:9]  # it blocks the server meanwhile


def test_a_pattern_that_matches_nothing_ends():
    assert serve.replace('masked', re.compile('x*'), serve.whole_size, 'a xx b x') == 'a [masked] b [masked]'


def test_alternatives_that_a_filter_masks_are_left_out(monkeypatch):
    """A rude token may be unlikely, but it is not shown."""
    monkeypatch.setattr(serve, 'chain', ['profanity'])
    rude, kind = [get_tokenizer().encode(word)[0] for word in (' idiot', ' friend')]
    logits = torch.zeros(1, 50257)
    logits[0, rude] = 9
    logits[0, kind] = 8
    record, = serve.score([kind], logits, 2)
    assert [other['token'] for other in record['top_logprobs']] == [' friend']


def test_a_prompt_is_masked_before_the_model_sees_it(url):
    """In a chat, in the input, in a raw prompt and in ids; a header tells which kinds."""
    prompt = 'Greet jo@example.org, you moron.'
    masked = 'Greet [email], you [offensive].'
    reply = chat(url, prompt)
    usage = reply.json()['usage']
    assert usage['prompt_tokens'] == len(encode_prompt({'instruction': masked})) != len(encode_prompt({'instruction': prompt}))
    assert reply.json()['choices'] == chat(url, masked).json()['choices']
    assert reply.headers['X-Masked'] == 'email, offensive' and 'X-Masked' not in chat(url, masked).headers
    for raw in (prompt, get_tokenizer().encode(prompt)):
        reply = completions(url, raw, max_tokens=0, echo=True)
        assert reply.json()['choices'][0]['text'] == masked and reply.headers['X-Masked'] == 'email, offensive'
        assert reply.json()['usage']['prompt_tokens'] == len(get_tokenizer().encode(masked))
    reply = chat(url, 'Greet him.', input=prompt)
    assert reply.headers['X-Masked'] == 'email, offensive' and reply.json()['choices'] == chat(url, 'Greet him.', input=masked).json()['choices']


@pytest.fixture(scope='module')
def guarded(run_folder):
    """A server with a key, patterns of its own in a file with a byte order mark, and room for one answer and two that wait."""
    (run_folder / 'mine.txt').write_text('\ufeffscor.\n\n', encoding='utf-8')
    with serving(run_folder, '--filters=patterns', '--patterns=mine.txt', '--max_active=1', '--queue=2', '--max_new_tokens=900',
                 '--without_key=True', env={'SERVE_API_KEY': 'sesame'}) as (url, _):
        yield url


def test_patterns_of_ones_own_mask_answers(guarded):
    client = openai.OpenAI(base_url=guarded + '/v1', api_key='sesame')
    messages = [{'role': 'user', 'content': 'Hello.'}]
    reply = client.chat.completions.create(model='tiny-before', messages=messages, logprobs=True)
    assert reply.choices[0].message.content == '{"[masked]": 7}' and reply.choices[0].logprobs is None
    stream = client.chat.completions.create(model='tiny-before', messages=messages, logprobs=True, stream=True)
    assert ''.join(chunk.choices[0].delta.content for chunk in stream) == '{"[masked]": 7}'


def test_the_key(guarded):
    for path in ('/v1/models', '/api/tags', '/metrics'):
        for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': 'sesame'}, {'Authorization': 'Bearer séame'.encode()}):
            assert requests.get(guarded + path, headers=headers).status_code == 401
        for scheme in ('Bearer', 'bearer', 'BEARER'):
            assert requests.get(guarded + path, headers={'Authorization': f'{scheme} sesame'}).ok
    assert chat(guarded, 'Hi').status_code == 401
    assert requests.get(guarded).ok and requests.get(guarded + '/health').json() == {'status': 'ok'}
    # the path decides that was asked for, not what a Host header makes of it
    host, port = guarded.removeprefix('http://').split(':')
    connection = http.client.HTTPConnection(host, int(port))
    connection.request('GET', '/v1/models', headers={'Host': 'localhost/health?'})
    assert connection.getresponse().status == 401


def test_another_name_needs_a_key(url, guarded):
    """A web page whose name is made to point here (DNS rebinding) must not read answers."""
    for host, status in (('evil.example', 403), ('localhost:1', 200), ('127.0.0.1', 200), ('[::1]:8000', 200), ('[::1', 403)):
        assert requests.get(url + '/v1/models', headers={'Host': host}).status_code == status
    assert requests.get(guarded + '/v1/models', headers={'Host': 'mine.example', 'Authorization': 'Bearer sesame'}).ok


def test_a_page_of_another_origin_may_not_ask(url, guarded):
    """It could make the server compute, though it reads nothing. The server's own page sends a header that others may not send; a key is enough."""
    body = {'messages': [{'role': 'user', 'content': 'Hi.'}], 'max_tokens': 1}
    for headers, status in (({'Origin': 'http://evil.example'}, 403), ({'Origin': 'null'}, 403), ({'Origin': url}, 200),
                            ({'Origin': 'https://hub.example', 'X-Requested-With': 'fetch'}, 200)):
        for path in (CHAT, '/api/chat'):
            assert requests.post(url + path, json=body, headers=headers).status_code == status
    preflight = requests.options(url + CHAT, headers={'Origin': 'http://evil.example', 'Access-Control-Request-Headers': 'X-Requested-With'})
    assert not any(name.lower().startswith('access-control') for name in preflight.headers)
    assert requests.get(url, headers={'Origin': 'http://evil.example'}).ok  # a link leads here
    assert requests.post(guarded + CHAT, json=body, headers={'Origin': 'http://evil.example', 'Authorization': 'bearer sesame'}).ok


# --- manners under load


def open_stream(url, text='Tell me all.', key='', **more):
    body = {'messages': [{'role': 'user', 'content': text}], 'max_tokens': 900, 'stream': True, 'n': 1} | more
    return requests.post(url + CHAT, json=body, stream=True, headers={'Authorization': f'Bearer {key}'}, timeout=60)


def test_a_full_queue(guarded):
    """Who finds it full is told to come again soon; who waits is answered."""
    running = open_stream(guarded, key='sesame', temperature=5, seed=1)  # for far longer than the next lines take
    with ThreadPoolExecutor(3) as pool:
        body = {'messages': [{'role': 'user', 'content': 'Tell.'}], 'max_tokens': 3}
        headers = {'Authorization': 'Bearer sesame'}
        first = [pool.submit(requests.post, guarded + CHAT, json=body, headers=headers) for _ in range(2)]
        wait_until(lambda: 'waiting_rows 2.0' in requests.get(guarded + '/metrics', headers=headers).text)
        refused = requests.post(guarded + CHAT, json=body, headers=headers)
        running.close()
        served = [reply.result() for reply in first]
    assert refused.status_code == 503 and refused.headers['Retry-After'] == '1' and 'waiting' in refused.json()['error']['message']
    assert all(reply.ok for reply in served)


def test_a_stream_comes_while_it_is_written(url):
    lines = open_stream(url, temperature=5, seed=3, max_tokens=300).iter_lines(decode_unicode=True)
    assert json.loads(next(lines)[6:])['choices'][0]['delta']['content']
    assert metric(url, 'active_rows') == 1  # hundreds of tokens are still to come
    assert list(lines)[-2] == 'data: [DONE]'


def test_a_stream_goes_on_beside_any_mixture(url):
    """Long prompts, and requests of one token one after the other, share the steps with it."""
    is_over = []

    def ask_again_and_again(text):
        n = 0
        while not is_over:
            assert chat(url, text, max_tokens=1).ok
            n += 1
        return n

    with ThreadPoolExecutor(6) as pool:
        askers = [pool.submit(ask_again_and_again, text) for text in ['Hi.'] * 3 + ['word ' * 900] * 3]
        text = open_stream(url, max_tokens=60, temperature=5, seed=2).text
        is_over.append(True)
        assert text.strip().endswith('[DONE]') and min(asker.result() for asker in askers) > 0


def test_a_step_is_bounded_and_serves_all_that_decode(monkeypatch):
    """Beside prompts of 900 tokens each step gives a running answer a token, and computes no more ids than its size."""
    engine = serve.ServingEngine(random_model(), 4e9, {}, [])
    sizes = []
    compute = engine.compute
    monkeypatch.setattr(engine, 'compute', lambda batch: sizes.append(sum(n for _, n in batch)) or compute(batch))
    first, *others = [engine_answer(ids, 20) for ids in ([1, 2, 3], *[list(range(i, i + 900)) for i in range(9)])]
    engine.add(first)
    engine.step_safely()
    engine.scheduler.waiting += others
    for n in range(2, 20):
        engine.step_safely()
        assert len(first.ids) == 3 + n
    assert max(sizes) == serve.max_active + serve.PREFILL_SIZE


def engine_answer(ids, n, **more):
    asked = SimpleNamespace(max_tokens=n, temperature=0, top_k=0, seed=1, stop=[], n_top=-1, echo=False, n=1)
    return serve.Answer(GPTConfig(**SHAPE), asked, ids, True, 0, SimpleNamespace(set=lambda: None))


def test_all_caches_stay_within_their_limit_and_are_given_back():
    engine = serve.ServingEngine(random_model(), 2e6, {}, [])  # 1,953 positions of this shape
    engine.scheduler.waiting += [engine_answer(list(range(i, i + 300)), 40) for i in range(20)]
    largest = 0
    while engine.has_work():
        engine.step_safely()
        largest = max(largest, sum(layer.nbytes for layer in engine.cache.layers))
    assert 1e6 < largest <= 2e6
    engine.rest()
    assert sum(layer.nbytes for layer in engine.cache.layers) == 0


def test_the_caches_share_what_cache_gb_allows(run_folder, monkeypatch):
    monkeypatch.setitem(serve.config, 'out_dir', str(run_folder / 'out'))
    monkeypatch.setattr(serve, 'served', {})
    serve.load_models()
    bytes_per_position = 2 * SHAPE['n_layer'] * SHAPE['n_embd'] * 4
    assert [engine.scheduler.max_positions * bytes_per_position for engine in serve.served.values()] == [2e9, 2e9]


def test_a_server_without_work_gives_its_memory_back(url):
    assert chat(url, QUESTIONS[0]).ok and metric(url, 'cache_bytes') > 0
    wait_until(lambda: metric(url, 'cache_bytes') == 0, serve.IDLE_SECONDS + 10)
    assert chat(url, QUESTIONS[0]).ok


def test_fewer_run_at_once_where_together_they_fail(monkeypatch):
    """Until it rests: then as many as before may run again."""
    engine = serve.ServingEngine(random_model(), 4e9, {}, [])
    failures = []
    hidden_states = engine.model.hidden_states

    def faulty(ids, positions, attention):
        if ids.numel() > 60:
            failures.append(ids.numel())
            raise RuntimeError('out of memory')
        return hidden_states(ids, positions, attention)

    monkeypatch.setattr(engine.model, 'hidden_states', faulty)
    answers = [engine_answer(list(range(i, i + 10)), 30) for i in range(30)]
    engine.scheduler.waiting += answers
    while engine.has_work():
        engine.step_safely()
    assert [len(answer.new_ids) for answer in answers] == [30] * 30
    assert 0 < len(failures) < 6 and engine.scheduler.max_running < 10
    engine.rest()
    assert engine.scheduler.max_running == serve.max_active


def test_an_answer_whose_last_token_cannot_be_scored_ends_with_the_error(monkeypatch):
    """It has left the batch by then, so that no later step would tell of it; nobody's turn is lost by that."""
    engine = serve.ServingEngine(random_model(), 4e9, {}, [])
    answer = engine_answer(list(range(10)), 1)
    answer.n_top = 0
    engine.add(answer)
    monkeypatch.setattr(serve, 'score', lambda *arguments: 1 / 0)
    [(ended, error)] = engine.step_safely()
    assert ended is answer and isinstance(error, ZeroDivisionError) and not engine.has_work()
    assert engine.scheduler.max_running >= 1


# fails each step in which the model meets ' swordfish', or more than so many ids
FAULT = """
import model
hidden_states = model.GPT.hidden_states
def faulty(self, ids, positions=None, attention=None):
    if 8429 in ids or ids.numel() > LIMIT:
        raise RuntimeError('a fault of this machine')
    return hidden_states(self, ids, positions, attention or model.causal_attention)
model.GPT.hidden_states = faulty
"""


def test_a_failure_ends_the_answers_at_fault_alone(run_folder):
    """Each in its dialect, so that no client takes the rest for the whole; what runs beside them goes on as if nothing were."""
    assert get_tokenizer().encode(' swordfish')[0] == 8429
    with serving(run_folder, '--filters=', first=FAULT.replace('LIMIT', '9999')) as (url, process), ThreadPoolExecutor(8) as pool:
        settings = {'temperature': 1.0, 'seed': 4, 'top_k': 2}  # among all ids rounding would decide now and then
        others = [pool.submit(chat, url, text, max_tokens=60, **settings) for text in QUESTIONS]
        wait_until(lambda: metric(url, 'active_rows') > 0)
        fish = 'A swordfish.'
        assert chat(url, fish).status_code == 500 and 'fault of this machine' in chat(url, fish).json()['error']['message']
        chunks = open_stream(url, fish).text.split('\n\n')
        assert json.loads(chunks[0][6:])['choices'][0]['finish_reason'] == 'error' and 'fault of this machine' in chunks[1]
        client = openai.OpenAI(base_url=url + '/v1', api_key='none')
        with pytest.raises(openai.APIError, match='fault of this machine'):
            list(client.chat.completions.create(model='tiny-sft', messages=[{'role': 'user', 'content': fish}], stream=True))
        for stream in (False, True):
            with pytest.raises(ollama.ResponseError, match='fault of this machine'):
                list(ollama.Client(url).generate('tiny-sft', fish, stream=stream))
        for text, reply in zip(QUESTIONS, others):
            right = expected(random_model(), {'instruction': text}, 60, **settings)
            assert reply.result().json()['choices'][0]['message']['content'] == right
        assert process.returncode is None and 'swordfish' not in ''.join(process.output())


def test_answers_that_are_too_many_for_the_memory_share_it_in_turns(run_folder):
    """Nobody is at fault where each can be computed alone: then fewer run at once, and all are right."""
    with serving(run_folder, '--filters=', first=FAULT.replace('LIMIT', '60')) as (url, _), ThreadPoolExecutor(30) as pool:
        rows = [{'instruction': f'{QUESTIONS[i % 5]} {i}'} for i in range(30)]
        replies = list(pool.map(lambda row: chat(url, row['instruction'], max_tokens=20), rows))
        model = random_model()
        assert [reply.json()['choices'][0]['message']['content'] for reply in replies] == [expected(model, row, 20) for row in rows]


@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_goes_away_frees_its_rows(url, stream):
    before, parts = metric(url, 'new_tokens_total'), url.removeprefix('http://').split(':')
    connection = http.client.HTTPConnection(parts[0], int(parts[1]))
    body = {'messages': [{'role': 'user', 'content': QUESTIONS[0]}], 'max_tokens': 900, 'stream': stream, 'n': 16, 'temperature': 5}
    connection.request('POST', CHAT, json.dumps(body))
    wait_until(lambda: metric(url, 'active_rows') > 0)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until(lambda: metric(url, 'active_rows') == 0)
    assert metric(url, 'new_tokens_total') - before < 16 * 700


@pytest.fixture(scope='module')
def hasty(run_folder):
    """A server that gives a request one second."""
    with serving(run_folder, '--max_new_tokens=900', '--request_timeout=1', '--filters=', '--max_active=8') as (url, _):
        yield url


def test_the_time_limit(hasty):
    """It ends those that are computed with what they have, and those that wait for room with nothing."""
    began = time.monotonic()
    reply = chat(hasty, 'Tell.', n=16, max_tokens=900, temperature=5, seed=1).json()
    assert time.monotonic() - began < 4
    assert {'length'} <= {choice['finish_reason'] for choice in reply['choices']} <= {'length', 'stop'}
    assert 0 < reply['usage']['completion_tokens'] < 8 * 800 and '' in [choice['message']['content'] for choice in reply['choices']]
    lines = open_stream(hasty, n=16, temperature=5).text
    assert lines.strip().endswith('[DONE]')
    wait_until(lambda: metric(hasty, 'active_rows') == metric(hasty, 'waiting_rows') == 0)


@pytest.mark.parametrize('sent, status', [
    (b'', None), (b'POST /v1/completions HTTP/1.1\r\nHost: local', None), (b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea', 200),
    (b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"prompt"', 408)])
def test_half_a_request_does_not_hold_a_connection(hasty, sent, status):
    host, port = hasty.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        reply = b''
        while part := connection.recv(1000):  # until the server closes it
            reply += part
    assert reply.startswith(f'HTTP/1.1 {status}'.encode()) if status else reply == b''


def test_an_answer_has_no_more_tokens_than_the_server_allows(run_folder):
    with serving(run_folder, '--max_new_tokens=7', '--before=False') as (url, _):
        for more in ({'max_tokens': 5000}, {'max_tokens': None}, {'max_tokens': -1}):
            reply = chat(url, QUESTIONS[0], temperature=5, seed=1, **more).json()
            assert reply['usage']['completion_tokens'] == 7 and reply['choices'][0]['finish_reason'] == 'length'
        assert [model['id'] for model in requests.get(url + '/v1/models').json()['data']] == ['tiny-sft']


def test_sigterm_lets_answers_end(run_folder):
    """And all of it works with matrices in float16."""
    with serving(run_folder, '--max_new_tokens=900', '--filters=', '--dtype=float16') as (url, process):
        assert requests.get(url + '/api/tags').json()['models'][0]['details']['parameter_size'] == '3M'
        whole = chat(url, 'Tell.', max_tokens=400, temperature=5, seed=1).json()['choices'][0]['message']['content']
        reply = open_stream(url, 'Tell.', temperature=5, seed=1, max_tokens=400)
        lines = reply.iter_lines(decode_unicode=True)
        first = next(lines)
        os.kill(process.pid, signal.SIGTERM)
        chunks = [json.loads(line[6:]) for line in [first, *lines] if line.startswith('data: {')]
        assert ''.join(chunk['choices'][0]['delta']['content'] for chunk in chunks) == whole
        assert process.wait(timeout=20) == 0
        with pytest.raises(requests.ConnectionError):
            requests.get(url + '/health')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_line_that_tells_the_address_is_heard(run_folder, number):
    """uvicorn takes signals over a moment later."""
    with serving(run_folder, '--before=False') as (_, process):
        os.kill(process.pid, number)
        assert process.wait(timeout=10) == 0


def test_no_prompt_is_logged(server):
    url, process = server
    chat(url, 'Confidential: swordfish.')
    chat(url, 'Confidential: swordfish.', temperature=-1)
    assert 'swordfish' not in ''.join(process.output())


def test_the_page_and_its_policy(url):
    reply = requests.get(url, headers={'Origin': 'http://evil.example'})
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", reply.headers['Content-Security-Policy'])[1]
    assert f'<script nonce="{nonce}">' in reply.text and 'NONCE' not in reply.text
    assert "default-src 'none'" in reply.headers['Content-Security-Policy'] and nonce not in requests.get(url).text
    assert not any(name.lower().startswith('access-control') for name in reply.headers)
    assert 'https://' not in reply.text and 'src="http' not in reply.text


@pytest.mark.parametrize('flags, words', [
    (['--host=0.0.0.0'], 'SERVE_API_KEY'), (['--filters=swearing'], "filters='swearing'"), (['--filters=patterns'], '--patterns='),
    (['--filters=patterns', '--patterns=none.txt'], 'none.txt'), (['--max_active=0'], 'max_active'), (['--init_from=gpt2-mediumm'], 'gpt2-medium'),
    (['--host=192.0.2.1', '--without_key=True'], '192.0.2.1'), (['--port=PORT'], 'cannot listen'), (['--cache_gb=0'], 'cache_gb')])
def test_mistakes_at_the_start_are_told_in_one_line(run_folder, url, flags, words):
    flags = [flag.replace('PORT', url.rsplit(':')[-1]) for flag in flags]
    assert words in stage(run_folder, 'serve.py', *flags, code=2).stderr
