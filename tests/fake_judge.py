"""
A judge's server for tests: Ollama's API and /v1/chat/completions, with every fault that real ones have shown.

    python tests/fake_judge.py      # prints its port, answers {"score": 50} to everything

server.scripts: {a text in the prompt: [what to do at each asking of it, the last for all further ones]}; what to do is a
text to answer with, a status to fail with, or 'STALL', 'HANG', 'LENGTH', 'MIDSTREAM', 'BREAK', 'DROP', 'NOTHING', 'LIMIT', 'ECHO KEY'. What no
script names is for server.opinion(prompt) to answer. server.kind: a name of KINDS, servers that refuse what others take.
"""
import difflib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def fenced(prompt, name):
    """The texts that stand between the marks of this name."""
    return [text for _, text in re.findall(rf'<<< {name} (\w+)\n(.*?)\n>>> end of {name} \1', prompt, re.DOTALL)]


def honest(prompt):
    """Score the last answer by its likeness to the correct one."""
    right = fenced(prompt, 'correct answer')[-1]
    said = fenced(prompt, 'answer')[-1]
    return json.dumps({'score': round(100 * difflib.SequenceMatcher(None, right, said).ratio())})


# --- servers as people report them: a request's body -> None, or the status and the message with which it is refused


def newest_openai(body):
    if 'max_tokens' in body:
        return 400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    if body.get('temperature', 1) != 1:
        return 400, "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."


def anthropic(body):
    if 'temperature' in body and 'top_p' in body:
        return 400, '`temperature` and `top_p` cannot both be specified for this model. Please use only one.'


def mistral(body):
    if 'seed' in body:
        return 422, {'detail': [{'type': 'extra_forbidden', 'loc': ['body', 'seed'], 'msg': 'Extra inputs are not permitted', 'input': 123}]}


def without_schemas(body):
    if 'response_format' in body:
        return 500, "Input should be 'text': response_format"


def short_context(body):
    if len(str(body['messages'])) > 2000:
        return 400, "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's maximum context length is 500 tokens."


def without_thinking(body):
    if 'think' in body:
        return 400, 'unknown field "think"'


KINDS = {'newest OpenAI': newest_openai, 'Anthropic': anthropic, 'Mistral': mistral, 'without schemas': without_schemas, 'short context': short_context,
         'without thinking': without_thinking}


class FakeJudge(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, opinion=lambda prompt: '{"score": 50}', models=None, kind='', base='/v1'):
        super().__init__(('127.0.0.1', 0), Handler)
        self.opinion = opinion
        self.models = {'llama3:latest': 'd1'} if models is None else models  # name: digest
        self.kind = kind
        self.base = base  # the path of OpenAI's API
        self.version = '0.9.0'
        self.key = ''  # that clients must send, if any
        self.delay = 0.0  # seconds before each answer
        self.retry_after = ''  # a header of 429 and 503
        self.quota = -1  # questions after which the credit is used up; -1: never
        self.thinks = False  # an Ollama model that thinks, and so says nothing within the limit, unless told not to
        self.scripts = {}
        self.asked = []  # the bodies of all questions
        self.loads = []  # the bodies that ask Ollama to load the model
        self.paths = []  # of all requests
        self.lock = threading.Lock()
        self.url = f'http://127.0.0.1:{self.server_port}'

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def handle_error(self, *_):
        pass  # clients that hang up are what some tests are about

    def act(self, body):
        prompt = body['messages'][0]['content']
        with self.lock:
            self.asked.append(body)
            for text, acts in self.scripts.items():
                if text in prompt:
                    return acts.pop(0) if len(acts) > 1 else acts[0]
        return self.opinion(prompt)

    def prompts(self):
        return [body['messages'][0]['content'] for body in self.asked]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def send(self, status, value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        if status in (429, 503) and self.server.retry_after:
            self.send_header('Retry-After', self.server.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        server = self.server
        server.paths.append(self.path)
        if self.path == '/api/version':
            self.send(200, {'version': server.version})
        elif self.path == '/api/tags':
            self.send(200, {'models': [{'name': name, 'digest': digest} for name, digest in server.models.items()]})
        elif self.path == f'{server.base}/models':
            if server.key and self.headers.get('Authorization') != f'Bearer {server.key}':
                return self.send(401, {'error': {'message': f'bad key {self.headers.get("Authorization")}'}})
            self.send(200, {'data': [{'id': name, 'created': time.time(), 'meta': digest}
                                     for name, digest in server.models.items()]})
        else:
            self.send(404, {'error': 'not found'})

    def do_POST(self):
        server = self.server
        server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        is_openai = self.path == f'{server.base}/chat/completions'
        if not is_openai and self.path != '/api/chat':
            return self.send(404, {'error': {'message': f'no route {self.path}'}})
        refusal = KINDS[server.kind](body) if server.kind else None
        if refusal:
            status, message = refusal
            return self.send(status, {'error': {'message': message}} if is_openai else {'error': message})
        if not body['messages']:
            server.loads.append(body)
            return self.send(200, {'done': True, 'done_reason': 'load', 'message': {'role': 'assistant', 'content': ''}})
        act = server.act(body)
        time.sleep(server.delay)
        if 0 <= server.quota < len(server.asked):
            act = 'QUOTA'
        if act == 'DROP':
            self.close_connection = True
            return
        if act in ('STALL', 'HANG'):
            time.sleep(3 if act == 'STALL' else 60)
            self.close_connection = True
            return
        if act == 'MIDSTREAM':
            return self.send(200, b'{"message": {"content": "{"}, "done": false}\n{"error": "the runner stopped"}\n')
        if act == 'BREAK':  # of the announced body only the beginning comes
            self.send_response(200)
            self.send_header('Content-Length', '100')
            self.end_headers()
            self.wfile.write(b'{"message": {"con')
            self.close_connection = True
            return
        if act == 'QUOTA':
            return self.send(429, {'error': {'message': 'You exceeded your current quota, please check your plan and billing details.',
                                             'type': 'insufficient_quota', 'code': 'insufficient_quota'}})
        if act == 'LIMIT':
            return self.send(429, {'error': {'message': 'Rate limit reached, try again in 2 s. Need more? See your billing settings.'}})
        if act == 'ECHO KEY':
            return self.send(400, {'error': {'message': f'incorrect key {self.headers.get("Authorization")}'}})
        if isinstance(act, int) and act >= 400:
            return self.send(act, {'error': {'message': f'status {act}'} if is_openai else f'status {act}'})
        reason = 'length' if act == 'LENGTH' else 'stop'
        message = {'role': 'assistant', 'content': {'LENGTH': '{"score":', 'NOTHING': ''}.get(act, act) if isinstance(act, str) else act}
        if is_openai:
            return self.send(200, {'choices': [{'message': message, 'finish_reason': reason}]})
        if server.thinks and body.get('think') is not False:
            message = {'role': 'assistant', 'content': '', 'thinking': 'Okay, let me see. The instruction asks ' * 8}
            reason = 'length'
        self.send(200, {'message': message, 'done': True, 'done_reason': reason})


if __name__ == '__main__':
    server = FakeJudge()
    print(server.server_port, flush=True)
    server.serve_forever()
