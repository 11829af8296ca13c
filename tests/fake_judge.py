"""
A judge's server for tests: Ollama's API and /v1/chat/completions, with every fault that real ones have shown.

    python tests/fake_judge.py      # prints its port, answers {"score": 50} to everything

server.scripts: {a text in the prompt: [what to do at each asking of it, the last for all further ones]}; what to do is a
text to answer with, a status to fail with, or 'STALL', 'LENGTH', 'MIDSTREAM', 'BREAK', 'DROP', 'NOTHING', 'ECHO KEY'. What no
script names is for server.opinion(prompt) to answer.
"""
import difflib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def fenced(prompt, name):
    """-> the texts that stand between the marks of this name."""
    return [text for _, text in re.findall(rf'<<< {name} (\w+)\n(.*?)\n>>> end of {name} \1', prompt, re.DOTALL)]


def honest(prompt):
    """Score the last answer by its likeness to the correct one."""
    right, said = fenced(prompt, 'correct answer')[-1], fenced(prompt, 'answer')[-1]
    return json.dumps({'score': round(100 * difflib.SequenceMatcher(None, right, said).ratio())})


class FakeJudge(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, opinion=lambda prompt: '{"score": 50}', models=None, forms=('json_schema',)):
        super().__init__(('127.0.0.1', 0), Handler)
        self.opinion, self.forms = opinion, forms
        self.models = {'llama3:latest': 'd1'} if models is None else models
        self.version, self.key, self.delay, self.retry_after = '0.9.0', '', 0.0, ''
        self.scripts, self.asked, self.paths, self.lock = {}, [], [], threading.Lock()
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
        elif self.path == '/v1/models':
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
        openai = self.path.startswith('/v1')
        if not body['messages']:
            return self.send(200, {'done': True, 'done_reason': 'load', 'message': {'role': 'assistant', 'content': ''}})
        form = body.get('response_format')
        if openai and form and form['type'] not in server.forms:
            return self.send(500, {'error': {'message': f"Input should be one of {server.forms}: response_format"}})
        act = server.act(body)
        time.sleep(server.delay)
        if act == 'DROP':
            self.close_connection = True
            return
        if act == 'STALL':
            time.sleep(3)
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
        if act == 'ECHO KEY':
            return self.send(400, {'error': {'message': f'incorrect key {self.headers.get("Authorization")}'}})
        if isinstance(act, int):
            return self.send(act, {'error': {'message': f'status {act}'} if openai else f'status {act}'})
        reason = 'length' if act == 'LENGTH' else 'stop'
        message = {'role': 'assistant', 'content': {'LENGTH': '{"score":', 'NOTHING': ''}.get(act, act)}
        if openai:
            return self.send(200, {'choices': [{'message': message, 'finish_reason': reason}]})
        self.send(200, {'message': message, 'done': True, 'done_reason': reason})


if __name__ == '__main__':
    server = FakeJudge()
    print(server.server_port, flush=True)
    server.serve_forever()
