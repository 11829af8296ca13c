"""
Ask a model behind a server until its answer is valid: Ollama's own API, or any server with /v1/chat/completions.

    server = Server('ollama', 'llama3')
    server.check()
    answers = ask_all(server, [server.body('Reply with a number.', None, 123)], int, 'out/judge.jsonl')

An ask ends in a text that its reader takes, or in a fault that says why not. Each is appended to a file as it comes, under
a hash of all that could change it, so what was answered once is not asked again.
"""
import hashlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from config import UserError

WAITS = 0, 1, 2, 4  # times `backoff`: seconds before each try of a request
TRIES = 3  # times that an answer is asked for until it is valid
LOAD = 600  # seconds that a server may take to load a model
PATIENCE = 3  # unanswered asks in a row, for each worker, after which a server counts as gone
TRANSIENT = 408, 429, 500, 502, 503, 504  # what the same request may be spared the next time
FORMS = {  # how a server wants to be told the answer's schema; the first that it takes is used
    'json_schema': lambda schema: {'type': 'json_schema', 'json_schema': {'name': 'answer', 'schema': schema}},
    'json_object': lambda schema: {'type': 'json_object', 'schema': schema},
    'none': lambda schema: None,  # the prompt alone asks for the form, the reader insists on it
}


class Fault(Exception):
    """Why a request came to nothing. status: the HTTP status, 0 if no reply came at all."""
    def __init__(self, text, status=0):
        super().__init__(text)
        self.status = status


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def server_address(kind, url):
    """judge_url or OLLAMA_HOST, which may lack a scheme or name the address that Ollama binds -> a base to put paths on."""
    if kind == 'openai' and not url:
        raise UserError("judge='openai' needs the server's base: --judge_url=http://127.0.0.1:8000 or the like")
    url = url or os.environ.get('OLLAMA_HOST', '').strip() or '127.0.0.1'
    bare = '://' not in url
    parts = urlsplit('http://' + url if bare else url)
    try:
        port = parts.port or (11434 if bare and kind == 'ollama' else None)
    except ValueError as error:
        raise UserError(f'{url} is no address of a server: {error}') from error
    host = '127.0.0.1' if parts.hostname in (None, '0.0.0.0', '::') else parts.hostname
    host = f'[{host}]' if ':' in host else host
    return f'{parts.scheme}://{host}{f":{port}" if port else ""}{parts.path.rstrip("/").removesuffix("/v1")}'


class Server:
    """kind: 'ollama' or 'openai'. timeout: seconds an answer may take. backoff: seconds, scales the waits between tries."""

    def __init__(self, kind, model, url='', timeout=300.0, backoff=1.0):
        self.kind, self.model, self.timeout, self.backoff = kind, model, timeout, backoff
        self.url = server_address(kind, url)
        self.key = os.environ.get('OPENAI_API_KEY', '').strip() if kind == 'openai' else ''
        self.version = self.digest = ''
        self.form = 'json_schema'
        self.unanswered, self.patience = 0, PATIENCE
        self.local = threading.local()  # a requests.Session is not made for several threads

    def session(self):
        if not hasattr(self.local, 'session'):
            self.local.session = session = requests.Session()
            # a proxy in the environment is not meant for this machine; for other ones it is
            session.trust_env = urlsplit(self.url).hostname not in ('127.0.0.1', 'localhost', '::1')
            if self.key:  # as auth rather than as a header, which a ~/.netrc would override
                session.auth = lambda request: request.headers.update(Authorization=f'Bearer {self.key}') or request
        return self.local.session

    def call(self, path, body=None, timeout=0, waits=WAITS):
        """GET path, or POST body to it, once for each of waits at most -> the reply's object. Raises Fault."""
        timeout = timeout or self.timeout
        for wait in waits:
            time.sleep(wait * self.backoff)
            try:
                reply = self.session().request('POST' if body else 'GET', self.url + path, json=body, timeout=(10, timeout))
            except requests.RequestException as error:
                fault = Fault(f'no answer within {timeout:g} s' if isinstance(error, requests.Timeout) else
                              'the connection failed' if isinstance(error, requests.ConnectionError) else
                              f'the request failed ({type(error).__name__})')
                continue
            text = reply.content.decode('utf-8', 'replace')
            text = text.replace(self.key, '[key]') if self.key else text  # a server may repeat it in its error
            try:
                data = json.loads(text)
            except ValueError:  # a stream's lines, or a page of a proxy's
                data = None
            if reply.status_code == 200 and isinstance(data, dict) and not data.get('error'):
                return data
            error = data.get('error', data) if isinstance(data, dict) else text
            error = error.get('message', error) if isinstance(error, dict) else error
            fault = Fault(f'HTTP {reply.status_code}: {" ".join(str(error).split())[:200]}', reply.status_code)
            if reply.status_code not in (200, *TRANSIENT):  # 200 with an error in it: the model failed half way
                break
        raise fault

    def check(self):
        """Learn the server's version and the model's digest. UserError with what to type if one of them is not there."""
        ollama = self.kind == 'ollama'
        start = 'start it with: ollama serve' if ollama else 'start it, or set --judge_url'
        try:
            if ollama:
                self.version = str(self.call('/api/version', waits=[0]).get('version', ''))
                models = {model['name']: model['digest'] for model in self.call('/api/tags')['models']}
            else:
                # no server of this kind tells a digest: what a listing says of a model's weights stands in for it
                models = {model['id']: digest({key: model.get(key) for key in ('root', 'meta', 'owned_by')})
                          for model in self.call('/v1/models', waits=[0])['data']}
        except Fault as fault:
            if fault.status in (401, 403):
                start = 'set OPENAI_API_KEY to a key that it takes' if not ollama else start
            elif not ollama and fault.status:
                return  # a server need not list its models
            raise UserError(f'no judge at {self.url} ({fault}); {start}') from fault
        except (KeyError, TypeError) as error:
            raise UserError(f'{self.url} does not speak the API of judge={self.kind!r}') from error
        name = self.model if self.model in models else self.model + ':latest'
        if name not in models:
            get = f'type: ollama pull {self.model}' if ollama else 'set --judge_model to one of: ' + ', '.join([*models][:8])
            raise UserError(f'the server at {self.url} has no model {self.model!r}; {get}')
        self.digest = models[name]

    def load(self, body):
        """Have the model loaded, with time for it, and find the schema's form. UserError if it cannot."""
        try:
            if self.kind == 'ollama':
                # the same context length as the asks have: another one would load the model again
                body = {key: body[key] for key in ('model', 'stream', 'keep_alive', 'options')} | {'messages': []}
                self.call('/api/chat', body, timeout=max(LOAD, self.timeout))
                return
            for self.form in FORMS:
                try:
                    self.chat(body | {'max_tokens': 8}, max(LOAD, self.timeout), WAITS if self.form == 'none' else WAITS[:2])
                    return
                except Fault as fault:
                    if fault.status in (0, 401, 403, 404) or self.form == 'none' or 'response_format' not in body:
                        raise
        except Fault as fault:
            raise UserError(f'{self.model} at {self.url} does not answer: {fault}') from fault

    def body(self, prompt, schema, seed, temperature=0.0, context=4096, limit=64):
        """The request for one answer of at most `limit` tokens, every option pinned: servers' defaults have drifted."""
        body = {'model': self.model, 'stream': False, 'messages': [{'role': 'user', 'content': prompt}]}
        if self.kind == 'ollama':
            options = {'temperature': temperature, 'seed': seed, 'top_k': 40 if temperature else 1, 'top_p': 1.0,
                       'min_p': 0.0, 'repeat_penalty': 1.0, 'num_ctx': context, 'num_predict': limit}
            body |= {'keep_alive': '30m', 'truncate': False, 'options': options} | ({'format': schema} if schema else {})
        else:
            body |= {'temperature': temperature, 'top_p': 1.0, 'seed': seed, 'max_tokens': limit}
            body |= {'response_format': schema} if schema else {}  # chat() puts it in the form that the server takes
        return body

    def chat(self, body, timeout=0, waits=WAITS):
        """-> (the answer's text, whether it ended by itself). Raises Fault."""
        if 'response_format' in body:
            body = body | {'response_format': FORMS[self.form](body['response_format'])}
            body = body if body['response_format'] else {key: body[key] for key in body if key != 'response_format'}
        reply = self.call('/api/chat' if self.kind == 'ollama' else '/v1/chat/completions', body, timeout, waits)
        try:
            reply = reply if self.kind == 'ollama' else reply['choices'][0]
            return reply['message']['content'] or '', reply.get('done_reason', reply.get('finish_reason')) != 'length'
        except (KeyError, IndexError, TypeError):
            raise Fault(f'a reply without an answer: {str(reply)[:200]}', 200) from None

    def ask(self, body, read):
        """Ask until read(text) raises no ValueError, saying each time what was wrong -> {text, tries, [fault]}."""
        messages, text, tries = body['messages'], '', 0
        try:
            if self.unanswered >= self.patience:
                raise Fault('not asked, since the server had stopped answering')
            for tries in range(1, TRIES + 1):
                text, ended = self.chat(body | {'messages': messages})
                self.unanswered = 0
                try:
                    if not ended:
                        raise ValueError('it was cut off at its limit of tokens')
                    read(text)
                    return {'text': text, 'tries': tries}
                except ValueError as error:
                    fault, wrong = f'no valid answer in {tries} tries: {error}', f'Your answer cannot be used: {error}.'
                said = {'role': 'assistant', 'content': text or '(nothing)'}
                messages = messages + [said, {'role': 'user', 'content': wrong + ' Answer again.'}]
        except Fault as error:
            self.unanswered += error.status == 0
            fault = str(error)
        return {'text': text, 'tries': tries, 'fault': fault}


def read_answers(path):
    """-> {key: answer} of a file of answers; a last line that an interruption cut is not one."""
    answers = {}
    if Path(path).exists():
        for line in Path(path).read_text(encoding='utf-8', errors='replace').split('\n'):
            try:
                answer = json.loads(line)
                answers[answer.pop('key')] = answer
            except (ValueError, KeyError, AttributeError):
                continue
    return answers


def ask_all(server, bodies, read, path, workers=1):
    """
    -> the answers {text, tries, [fault]} to bodies, in their order. A body whose answer stands in the file at path is not
    asked again, unless it ended in a fault; equal bodies are asked once.
    """
    known = read_answers(path)
    keys = [digest([body, server.version, server.digest, server.kind == 'openai' and server.url]) for body in bodies]
    todo = {key: body for key, body in zip(keys, bodies) if 'fault' in known.get(key, {'fault': ''})}
    print(f'\n{len(bodies):,} questions for {server.model}, {len(todo):,} of them new', flush=True)
    if not todo:
        return [known[key] for key in keys]
    server.load(next(iter(todo.values())))
    server.patience = PATIENCE * workers
    lock = threading.Lock()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'ab+') as file:
            if file.tell() and not Path(path).read_bytes().endswith(b'\n'):  # an interruption cut the last line
                file.write(b'\n')

            def work(key):
                answer = known[key] = server.ask(todo[key], read)
                with lock:  # at once, so that an interruption loses nothing
                    file.write(json.dumps({'key': key} | answer).encode() + b'\n')
                    file.flush()

            with ThreadPoolExecutor(workers) as pool:
                bar = tqdm(pool.map(work, todo), 'judging', len(todo), disable=not sys.stderr.isatty())
                for done, _ in enumerate(bar, 1):
                    if bar.disable and done % max(len(todo) // 10, 1) == 0:
                        print(f'judged {done:,}/{len(todo):,}', flush=True)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from error
    return [known[key] for key in keys]
