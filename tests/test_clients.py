"""
serve.py and the clients that people use: what each of them makes of an answer, whole and as a stream, is what was answered.

A client that is not installed is skipped; with INTEROP in the environment (make interop) all are required.
"""
import asyncio
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from prepare import get_tokenizer

import pytest
import requests
import torch
from test_serve import QUESTIONS, expected, random_model, run_folder, server, url  # noqa: F401

os.environ |= {'LITELLM_LOCAL_MODEL_COST_MAP': 'True', 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1', 'DO_NOT_TRACK': '1'}
MODEL = 'tiny-sft'
QUESTION = QUESTIONS[1]
MESSAGES = [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': QUESTION}]
N = 12  # tokens of an answer


def need(name):
    """A module, or the test is skipped; where clients are required it fails."""
    if os.environ.get('INTEROP'):
        return importlib.import_module(name)
    return pytest.importorskip(name)


@pytest.fixture(scope='module')
def answers(url):  # noqa: F811
    """What the model says: to a chat with a system message, to the question alone, and behind it."""
    model = random_model()
    return {'system': expected(model, {'instruction': QUESTION, 'input': 'Be kind.'}, N), 'alone': expected(model, {'instruction': QUESTION}, N),
            'raw': get_tokenizer().decode(model.generate(get_tokenizer().encode(QUESTION), N))}


# --- OpenAI's and Ollama's own packages, which are there in any case: asynchronous, and what test_serve does not do


def test_openai_asynchronous(url, answers):  # noqa: F811
    openai = need('openai')

    async def ask():
        async with openai.AsyncOpenAI(base_url=url + '/v1', api_key='none') as client:
            whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=N)
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=N, stream=True)
            return whole.choices[0].message.content, ''.join([chunk.choices[0].delta.content async for chunk in stream])

    assert asyncio.run(ask()) == (answers['system'], answers['system'])


def test_openai_accumulates_a_stream(url, answers):  # noqa: F811
    client = need('openai').OpenAI(base_url=url + '/v1', api_key='none')
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=N) as stream:
        for event in stream:
            if event.type == 'chunk':
                message = event.snapshot.choices[0].message
    assert (message.role, message.content) == ('assistant', answers['system'])


def test_ollama_asynchronous(url, answers):  # noqa: F811
    ollama = need('ollama')

    async def ask():
        client = ollama.AsyncClient(url)
        whole = await client.chat(MODEL, MESSAGES, options={'num_predict': N})
        stream = await client.generate(MODEL, QUESTION, system='Be kind.', stream=True, options={'num_predict': N})
        return whole.message.content, ''.join([part.response async for part in stream])

    assert asyncio.run(ask()) == (answers['system'], answers['system'])


# --- litellm and LangChain


@pytest.mark.parametrize('provider, path', [('openai', '/v1'), ('ollama', ''), ('ollama_chat', '')])
def test_litellm(url, answers, provider, path):  # noqa: F811
    """Its 'ollama/' writes a chat's roles into one prompt, so that a question alone tells what it hands on; it drops a last line's text."""
    litellm = need('litellm')
    messages, right = (MESSAGES, answers['system']) if provider != 'ollama' else (MESSAGES[1:], None)
    settings = {'model': f'{provider}/{MODEL}', 'api_base': url + path, 'api_key': 'none', 'messages': messages, 'max_tokens': N}
    whole = litellm.completion(**settings).choices[0].message.content
    stream = ''.join(chunk.choices[0].delta.content or '' for chunk in litellm.completion(stream=True, **settings))
    assert whole == stream and whole and right in (None, whole)


def test_litellm_continues_a_text(url, answers):  # noqa: F811
    litellm = need('litellm')
    settings = {'model': f'text-completion-openai/{MODEL}', 'api_base': url + '/v1', 'api_key': 'none', 'prompt': QUESTION, 'max_tokens': N}
    assert litellm.text_completion(**settings).choices[0].text == answers['raw']
    assert ''.join(chunk.choices[0].text or '' for chunk in litellm.text_completion(stream=True, **settings)) == answers['raw']


@pytest.mark.parametrize('package, name, settings, right', [
    ('langchain_openai', 'ChatOpenAI', {'max_tokens': N}, 'system'), ('langchain_openai', 'OpenAI', {'max_tokens': N, 'temperature': 0}, 'raw'),
    ('langchain_ollama', 'ChatOllama', {'num_predict': N, 'validate_model_on_init': True}, 'system'),
    ('langchain_ollama', 'OllamaLLM', {'num_predict': N}, 'alone')])
def test_langchain(url, answers, package, name, settings, right):  # noqa: F811
    address = {'base_url': url + '/v1', 'api_key': 'none'} if package == 'langchain_openai' else {'base_url': url}
    client = getattr(need(package), name)(model=MODEL, **address, **settings)
    asked = [(message['role'], message['content']) for message in MESSAGES] if right == 'system' else QUESTION
    text = lambda message: getattr(message, 'content', message)  # noqa: E731
    assert text(client.invoke(asked)) == answers[right]
    assert ''.join(text(message) for message in client.stream(asked)) == answers[right]
    assert [text(message) for message in client.batch([asked, asked])] == [answers[right]] * 2


# --- the commands llm and node


def test_the_command_llm(url, answers, tmp_path):  # noqa: F811
    need('llm')
    (tmp_path / 'extra-openai-models.yaml').write_text(f'- model_id: tiny\n  model_name: {MODEL}\n  api_base: {url}/v1\n')
    for more in ([], ['--no-stream']):
        command = [sys.executable, '-c', f'import sys; sys.path[:] = {sys.path!r}; from llm.cli import cli; cli()', '-m', 'tiny', '--key', 'none',
                   '-o', 'max_tokens', str(N), '-s', 'Be kind.', '--no-log', *more, QUESTION]
        done = subprocess.run(command, env=os.environ | {'LLM_USER_PATH': str(tmp_path)}, capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.strip() == answers['system'].strip()


NODE = """
import OpenAI from 'openai'
import { Ollama } from 'ollama'
const [url, model, messages, n] = JSON.parse(process.argv[2])
const openai = new OpenAI({baseURL: url + '/v1', apiKey: 'none'}), ollama = new Ollama({host: url})
const found = []
const asked = {model, messages, max_tokens: n}
found.push((await openai.chat.completions.create(asked)).choices[0].message.content)
let text = ''
for await (const chunk of await openai.chat.completions.create({...asked, stream: true})) text += chunk.choices[0].delta.content ?? ''
found.push(text)
const options = {num_predict: n}
found.push((await ollama.chat({model, messages, options})).message.content)
text = ''
for await (const part of await ollama.chat({model, messages, options, stream: true})) text += part.message.content
found.push(text)
console.log(JSON.stringify(found))
"""


def test_the_packages_of_npm(url, answers, tmp_path_factory):  # noqa: F811
    """openai and ollama, installed into a folder that NODE_CLIENTS names, or here where all clients are required."""
    folder = os.environ.get('NODE_CLIENTS')
    if not folder:
        if not os.environ.get('INTEROP') or not shutil.which('npm'):
            pytest.skip('NODE_CLIENTS names no folder with the packages openai and ollama')
        folder = tmp_path_factory.mktemp('node')
        subprocess.run(['npm', 'install', '--no-audit', '--no-fund', 'openai@7', 'ollama@0.6'], cwd=folder, check=True, capture_output=True, timeout=300)
    script = Path(folder, 'ask.mjs')
    script.write_text(NODE)
    done = subprocess.run(['node', script, json.dumps([url, MODEL, MESSAGES, N])], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [answers['system']] * 4


# --- lm-eval, on a task of ten rows of ours


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Tasks of lm-eval over the same ten rows: choices, and an answer that is compared."""
    need('lm_eval')
    rows = [{'question': f'The word after {n} is', 'choices': [f' {word}' for word in ('red', 'green', 'blue and white')], 'right': n % 3} for n in range(10)]
    path = tmp_path / 'rows.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    common = {'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(path)}}, 'test_split': 'test', 'doc_to_text': '{{question}}',
              'target_delimiter': ''}
    choosing = common | {'task': 'choosing', 'output_type': 'multiple_choice', 'doc_to_choice': '{{choices}}', 'doc_to_target': 'right'}
    writing = common | {'task': 'writing', 'output_type': 'generate_until', 'doc_to_target': '{{choices[right]}}', 'generation_kwargs': {'until': ['.'], 'max_gen_toks': N}}
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    import tiktoken
    # by the model's name; and the vocabulary is here, so that nothing is downloaded
    monkeypatch.setattr(tiktoken, 'encoding_for_model', lambda name: get_tokenizer())
    return rows, choosing, writing


@pytest.mark.parametrize('batch_size', [1, 4])
def test_lm_eval_local_completions(url, tasks, batch_size):  # noqa: F811
    """Each choice has the log-probability that the model gives it, and its greedy answers are ours."""
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    rows, choosing, writing = tasks
    client = LocalCompletionsAPI(base_url=url + '/v1/completions', model=MODEL, tokenizer_backend='tiktoken', batch_size=batch_size, max_length=1024)
    found = lm_eval.simple_evaluate(client, tasks=[choosing, writing], bootstrap_iters=0, log_samples=True)
    model = random_model()
    encode = get_tokenizer().encode
    for sample in found['samples']['choosing']:
        row = rows[sample['doc_id']]
        for choice, (logprob, _) in zip(row['choices'], sample['filtered_resps']):
            ids = encode(row['question'] + choice)
            n_context = len(encode(row['question']))
            with torch.no_grad():
                logprobs = model(torch.tensor([ids]))[0].log_softmax(1)
            right = sum(logprobs[i - 1, ids[i]].item() for i in range(n_context, len(ids)))
            assert abs(logprob - right) < 1e-2
    for sample in found['samples']['writing']:
        text = get_tokenizer().decode(model.generate(encode(rows[sample['doc_id']]['question']), N))
        assert sample['resps'][0][0] == text.partition('.')[0]
    assert 'acc,none' in found['results']['choosing']


def test_lm_eval_local_chat_completions(url, tasks):  # noqa: F811
    import lm_eval
    from lm_eval.models.openai_completions import LocalChatCompletion
    rows, _, writing = tasks
    client = LocalChatCompletion(base_url=url + '/v1/chat/completions', model=MODEL)
    found = lm_eval.simple_evaluate(client, tasks=[writing], apply_chat_template=True, bootstrap_iters=0, log_samples=True)
    model = random_model()
    for sample in found['samples']['writing']:
        answer = expected(model, {'instruction': rows[sample['doc_id']]['question']}, N)
        assert sample['resps'][0][0] == answer.partition('.')[0]


def test_what_is_not_heeded_is_told(url):  # noqa: F811
    """A client that sends settings that are not built gets an answer, and can know."""
    client = need('openai').OpenAI(base_url=url + '/v1', api_key='none')
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=1, top_p=0.5)
    assert raw.headers['X-Ignored'] == 'top_p' and raw.parse().choices
    assert requests.get(url + '/v1/models', timeout=9).ok
