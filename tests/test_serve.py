"""serve.py as its users meet it: the packages openai and ollama, our own judge.py, and clients that misbehave."""
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

import ollama
import openai
import pytest
import requests
import torch
from conftest import ROOT, Started, stage
from fake_judge import FakeJudge

import sample
import serve
from model import GPT, GPTConfig
from prepare import encode_prompt, get_tokenizer

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
            'model': asdict(model.config), 'init_from': origin, 'config': {'seed': 1}, 'step': 1, 'val_loss': 1.0}))
    return folder


@contextlib.contextmanager
def serving(folder, *flags, env=None):
    """serve.py in folder -> its URL, and the process."""
    process = Started(folder, [ROOT / 'serve.py', '--port=0', *flags], env or {})
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
    ids = model.generate([encode_prompt(row)], n, **settings)[0]
    return sample.response_text(ids)


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
    new_ids = model.generate([ids], 12)[0]
    reply = client.chat.completions.create(model='tiny-sft', messages=messages, max_tokens=12, logprobs=True, top_logprobs=3, n=2)
    assert [one.message.content for one in reply.choices] == [expected(model, {'instruction': QUESTIONS[0]}, 12)] * 2
    assert reply.choices[0].message.role == 'assistant' and reply.choices[1].index == 1
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 2 * len(new_ids))
    assert reply.choices[0].finish_reason == ('length' if len(new_ids) == 12 else 'stop')
    # log-probabilities, against the whole computed at once
    with torch.no_grad():
        logprobs = model(torch.tensor([ids + new_ids]))[0][0].log_softmax(1)[len(ids) - 1:-1]
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
    assert raw.choices[0].text == get_tokenizer().decode(model.generate([get_tokenizer().encode('The sea is')], 9)[0])
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
    with pytest.raises(openai.BadRequestError, match='top_p is not supported'):
        client.chat.completions.create(model='tiny-sft', messages=messages, top_p=0.5)


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
    with pytest.raises(ollama.ResponseError, match='no system message'):
        client.chat('tiny-sft', [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'x'}])


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


def test_stop_sequences(url):
    """The answer ends before the first, and a stream never shows the beginning of one."""
    whole = chat(url, QUESTIONS[3]).json()['choices'][0]['message']['content']
    stop = whole[len(whole) // 2:][:4]
    for more in ({'stop': stop}, {'stop': ['never there', stop]}):
        choice = chat(url, QUESTIONS[3], **more).json()['choices'][0]
        assert choice['message']['content'] == whole[:whole.index(stop)] and choice['finish_reason'] == 'stop'
        lines = chat(url, QUESTIONS[3], stream=True, **more).text.split('\n\n')[:-2]
        assert ''.join(json.loads(line[6:])['choices'][0]['delta']['content'] for line in lines) == whole[:whole.index(stop)]


def test_a_stream_of_an_answer_that_repeats_the_header(monkeypatch):
    """The header is dropped, as sample.py does, once it is whole; then each token comes once, with its piece of text."""
    monkeypatch.setattr(serve, 'chain', [])
    monkeypatch.setattr(serve, 'models', {'m': SimpleNamespace(config=GPTConfig())}, raising=False)
    answer = serve.Answer(('m', 'template'), 0, [], 0, SimpleNamespace(set=lambda: None), [1], 20)
    texts, tokens, new_ids = [], [], get_tokenizer().encode('### Response:\nThe cat 🎉 sat') + [50256]
    for new_id in new_ids:
        answer.ids.append(new_id)
        answer.finish_reason = 'stop' if new_id == 50256 else ''
        answer.receive(new_id)
        text, some = answer.take()
        texts.append(text)
        tokens += some
    assert ''.join(texts) == 'The cat 🎉 sat' and tokens == new_ids[:-1] and '\ufffd' not in ''.join(texts)


# --- what is refused


@pytest.mark.parametrize('path, body, status, words', [
    (CHAT, '{', 400, 'not a complete JSON object'),
    (CHAT, '[' * 100_001, 413, '100,000'),
    (CHAT, '[' * 50_000, 400, 'not a complete JSON object'),
    (CHAT, 'x' * 1_000_000, 413, '100,000 bytes'),
    (CHAT, {'messages': []}, 400, 'no instruction'),
    (CHAT, {'messages': [{'role': 'assistant', 'content': 'x'}]}, 400, 'last message must have the role user'),
    (CHAT, {'messages': [{'role': 'system', 'content': 'x'}, {'role': 'user', 'content': 'x'}]}, 400, 'no system message'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'temperature': -1}, 400, 'temperature'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'max_tokens': 'x'}, 400, 'max_tokens'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'n': 1000}, 400, 'n: '),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'tools': [{'type': 'function'}]}, 400, 'tools is not supported'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'word ' * 1100}]}, 400, 'tokens; it may have'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'a' * 20_000}]}, 400, 'tokens; it may have'),
    (CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'x'}, {'type': 'image_url'}]}]}, 400, 'only parts of type text'),
    ('/v1/completions', {'prompt': ' '}, 400, 'no instruction'),
    ('/api/generate', {'prompt': 'x', 'n': 2}, 400, 'n is not supported'),
    ('/api/chat', {'model': 'llama3', 'messages': [{'role': 'user', 'content': 'x'}]}, 404, "no model 'llama3'"),
    ('/api/generate', {'prompt': 'x', 'system': 'y'}, 400, 'no system message'),
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


# --- filters


def test_a_stream_shows_no_more_than_the_whole(monkeypatch):
    """At every length of a text, what is final is masked as it is in the whole text."""
    cases = [json.loads(line)['text'] for line in Path(ROOT, 'data/filter_cases.jsonl').read_text('utf-8').splitlines()]
    draw = random.Random(1)
    texts = cases + ['\n'.join(draw.sample(cases, 2)) for _ in range(40)] + [
        'MT84 MALT 0110 0001 2345 MTLC AST0 01S is hers', 'Call (030) 123 4567 or +49 (0) 30 1234567.', 'a@b.org', '4111 1111 1111 1111']
    for chain in (['pii', 'profanity'], ['pii']):
        monkeypatch.setattr(serve, 'chain', chain)
        for text in texts:
            whole = serve.mask(text)
            for size in range(len(text)):
                assert whole.startswith(serve.mask(text[:serve.final_size(text[:size])])), text[:size]


def test_a_stream_with_a_stop_sequence_shows_no_more_either(monkeypatch):
    monkeypatch.setattr(serve, 'chain', ['pii'])
    monkeypatch.setattr(serve, 'models', {'m': SimpleNamespace(config=GPTConfig())}, raising=False)
    text = 'Write to bob@example.com or pay with 4111 1111 1111 1111 now, please.'
    for stop in ('#', '### End', 'a stop sequence of many words', 'please'):
        answer = serve.Answer(('m', 'template'), 0, [stop], -1, SimpleNamespace(set=lambda: None), [1], 60)
        new_ids, pieces = get_tokenizer().encode(text) + [50256], []
        for new_id in new_ids:
            answer.ids.append(new_id)
            answer.finish_reason = 'stop' if new_id == 50256 else ''
            answer.receive(None)
            pieces.append(answer.take()[0])
        assert ''.join(pieces) == 'Write to [email] or pay with [card] now, ' + 'please.' * (stop != 'please')


@pytest.mark.parametrize('text, masked', [
    ('Write to jo.doe+x@mail.example.org.', 'Write to [email].'), ('Pay DE89 3704 0044 0532 0130 00 now', 'Pay [IBAN] now'),
    ('DE88 3704 0044 0532 0130 00', None), ('Card 4111-1111-1111-1111!', 'Card [card]!'), ('4111 1111 1111 1112', None),
    ('Ring +44 20 7946 0958 at 10', 'Ring [phone] at 10'), ('(555) 010-4567', '[phone]'), ('On 2024-05-17 at 12:30', None),
    ('3.14159265358979 and 1,234,567', None), ('You idiot!', 'You [offensive]!'), ('You 1d10t', 'You [offensive]'),
    ('Scunthorpe assesses class', None), ('A gay couple shut the door.', None), ('', None)])
def test_what_the_filters_mask(monkeypatch, text, masked):
    monkeypatch.setattr(serve, 'chain', ['pii', 'profanity'])
    assert serve.mask(text) == (masked or text)
    monkeypatch.setattr(serve, 'chain', [])
    assert serve.mask(text) == text


def test_a_long_hostile_text_is_filtered_in_time():
    for text in ('a' * 16_000, '1 ' * 8_000, 'a@' * 8_000, '0' * 16_000, 'A1' * 8_000, '+1 (' * 4_000, ('+' + '1' * 38 + 'x ') * 400):
        began = time.perf_counter()
        serve.mask(text)
        assert time.perf_counter() - began < 1, text[:9]  # it blocks the server meanwhile


def test_a_prompt_is_masked_before_the_model_sees_it(url):
    prompt = 'Greet jo@example.org, you moron.'
    masked = 'Greet [email], you [offensive].'
    usage = chat(url, prompt).json()['usage']
    assert usage['prompt_tokens'] == len(encode_prompt({'instruction': masked})) != len(encode_prompt({'instruction': prompt}))
    assert chat(url, prompt).json()['choices'] == chat(url, masked).json()['choices']


@pytest.fixture(scope='module')
def guarded(run_folder):
    """A server with a key, patterns of its own, a moderator, and room for one answer and two that wait."""
    (run_folder / 'mine.txt').write_text('scor.\n\n')
    opinion = lambda prompt: json.dumps({'score': 90 if 'bomb' in prompt else 3})  # noqa: E731
    with FakeJudge(opinion) as judge, serving(
            run_folder, '--filters=patterns,moderator', '--patterns=mine.txt', f'--judge_url={judge.url}', '--max_active=1',
            '--queue=2', '--max_new_tokens=900', '--request_timeout=20', '--without_key=True', env={'SERVE_API_KEY': 'sesame'}) as (url, _):
        yield url


def test_patterns_and_the_moderator(guarded):
    client = openai.OpenAI(base_url=guarded + '/v1', api_key='sesame')
    messages = [{'role': 'user', 'content': 'Hello.'}]
    reply = client.chat.completions.create(model='tiny-before', messages=messages, logprobs=True)
    assert reply.choices[0].message.content == '{"[masked]": 7}' and reply.choices[0].logprobs is None
    stream = client.chat.completions.create(model='tiny-before', messages=messages, logprobs=True, stream=True)
    assert ''.join(chunk.choices[0].delta.content for chunk in stream) == '{"[masked]": 7}'
    with pytest.raises(openai.BadRequestError, match='moderator refused'):
        client.chat.completions.create(model='tiny-before', messages=[{'role': 'user', 'content': 'A bomb.'}])


def test_a_moderator_that_takes_no_schema(run_folder):
    """Its server is asked for JSON by the prompt alone, as in judge.py."""
    with FakeJudge(lambda prompt: '{"score": 3}', forms=()) as judge, serving(
            run_folder, '--filters=moderator', '--judge=openai', f'--judge_url={judge.url}', '--judge_model=llama3:latest') as (url, _):
        assert chat(url, 'Hello.').ok


def test_the_key(guarded):
    for path in ('/v1/models', '/api/tags', '/metrics'):
        for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': 'sesame'}, {'Authorization': 'Bearer séame'.encode()}):
            assert requests.get(guarded + path, headers=headers).status_code == 401
        assert requests.get(guarded + path, headers={'Authorization': 'Bearer sesame'}).ok
    assert chat(guarded, 'Hi').status_code == 401
    assert requests.get(guarded).ok and requests.get(guarded + '/health').json() == {'status': 'ok'}


def test_another_name_needs_a_key(url, guarded):
    """A web page whose name is made to point here (DNS rebinding) must not read answers."""
    for host, status in (('evil.example', 403), ('localhost:1', 200), ('127.0.0.1', 200), ('[::1]:8000', 200)):
        assert requests.get(url + '/v1/models', headers={'Host': host}).status_code == status
    assert requests.get(guarded + '/v1/models', headers={'Host': 'mine.example', 'Authorization': 'Bearer sesame'}).ok


# --- manners under load


def open_stream(url, text='Tell me all.', key='', **more):
    body = {'messages': [{'role': 'user', 'content': text}], 'max_tokens': 900, 'stream': True, 'n': 1} | more
    return requests.post(url + CHAT, json=body, stream=True, headers={'Authorization': f'Bearer {key}'}, timeout=60)


def test_a_full_queue(guarded):
    headers = {'Authorization': 'Bearer sesame'}
    with ThreadPoolExecutor(8) as pool:
        body = {'messages': [{'role': 'user', 'content': 'Tell.'}], 'max_tokens': 300}
        replies = list(pool.map(lambda _: requests.post(guarded + CHAT, json=body, headers=headers), range(8)))
    refused = [reply for reply in replies if reply.status_code == 503]
    assert refused and all(int(reply.headers['Retry-After']) > 0 and 'waiting' in reply.json()['error']['message'] for reply in refused)
    served = {reply.json()['choices'][0]['message']['content'] for reply in replies if reply.ok}
    assert len(served) == 1 and len(refused) <= 5


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


def test_the_time_limit(run_folder):
    """It ends those that are computed with what they have, and those that wait for room with nothing."""
    with serving(run_folder, '--max_new_tokens=900', '--request_timeout=1', '--filters=', '--max_active=8') as (url, _):
        began = time.monotonic()
        reply = chat(url, 'Tell.', n=16, max_tokens=900, temperature=5, seed=1).json()
        assert time.monotonic() - began < 4
        assert {'length'} <= {choice['finish_reason'] for choice in reply['choices']} <= {'length', 'stop'}
        assert 0 < reply['usage']['completion_tokens'] < 8 * 800 and '' in [choice['message']['content'] for choice in reply['choices']]
        lines = open_stream(url, n=16, temperature=5).text
        assert lines.strip().endswith('[DONE]')
        wait_until(lambda: metric(url, 'active_rows') == metric(url, 'waiting_rows') == 0)


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
    (['--host=192.0.2.1', '--without_key=True'], '192.0.2.1'), (['--port=PORT'], 'cannot listen')])
def test_mistakes_at_the_start_are_told_in_one_line(run_folder, url, flags, words):
    flags = [flag.replace('PORT', url.rsplit(':')[-1]) for flag in flags]
    assert words in stage(run_folder, 'serve.py', *flags, code=2).stderr
