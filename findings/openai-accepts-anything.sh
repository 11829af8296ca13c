#!/usr/bin/env bash
# openai 3.57.0 (Python client).
# Seen, chat.completions.create against answers of status 200 that are no answers: a page of HTML comes back as
#   a str; {"error": {...}} as a ChatCompletion whose choices is None; numbers where texts belong stay numbers;
#   with stream=True a whole answer in JSON, or a page, is a stream of nothing, that ends without an error; JSON
#   that breaks off raises json.JSONDecodeError, which is not an openai.OpenAIError. In a stream, an event named
#   "error" is one more chunk unless its data has the key "error".
# A good guess: the client checks what it got (it is built on pydantic) and raises one of its own errors.
# Why it matters: a base_url without /v1, a proxy's log-in page and a server that ignores `stream` are ordinary
#   mistakes. They show as an AttributeError far away, or as an empty answer that is scored 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile openai==3.57.0
"$folder/venv/bin/python" - <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

reply = {}


class Server(BaseHTTPRequestHandler):
    """Answer every request by what `reply` holds."""

    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        self.send_response(200)
        self.send_header('Content-Type', reply['type'])
        self.send_header('Content-Length', str(len(reply['body'])))
        self.end_headers()
        self.wfile.write(reply['body'])

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f'http://127.0.0.1:{server.server_port}/v1', api_key='none', max_retries=0)


def ask(kind, body, stream=False):
    reply.update(type=kind, body=body.encode())
    answer = client.chat.completions.create(model='m', messages=[{'role': 'user', 'content': 'hi'}], stream=stream)
    answer = list(answer) if stream else answer
    print(f'{kind}, stream {stream}: {body!r} -> {type(answer).__name__} {str(answer)[:60]}')
    return answer


JSON, PAGE, EVENTS = 'application/json', 'text/html', 'text/event-stream'
whole = '{"choices": [{"message": {"role": "assistant", "content": "hello"}}]}'
assert ask(PAGE, '<html>log in</html>') == '<html>log in</html>'
assert ask(JSON, '{"error": {"message": "no memory"}}').choices is None
assert ask(JSON, whole.replace('"hello"', '5')).choices[0].message.content == 5
assert ask(JSON, whole, stream=True) == []
assert ask(PAGE, '<html>log in</html>', stream=True) == []
assert len(ask(EVENTS, 'event: error\ndata: {"message": "no memory"}\n\ndata: [DONE]\n\n', stream=True)) == 1
try:
    ask(EVENTS, 'data: {"error": {"message": "no memory"}}\n\n', stream=True)
except openai.APIError as error:
    print('an error inside the stream is raised:', error)
else:
    raise AssertionError('no error')
try:
    ask(JSON, '{"choices":')
except json.JSONDecodeError as error:
    assert not isinstance(error, openai.OpenAIError)
    print('JSON that breaks off:', type(error).__name__)
else:
    raise AssertionError('no error')
PY
