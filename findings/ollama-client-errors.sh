#!/usr/bin/env bash
# ollama 0.6.3 (Python client).
# Seen: (1) a blank line inside a streamed answer raises json.JSONDecodeError after the first words. (2)
#   {"error": ...} under status 200 is ollama.ResponseError in a stream and pydantic's ValidationError outside
#   one. (3) A redirect (301) is followed by turning the POST into a GET: without its body, and without a word.
#   (4) There is no time-out (None) and no retry of 503.
# A good guess: blank lines between JSON lines are keep-alives and skipped; every error of the server is a
#   ResponseError; a time-out of a minute or so, like the httpx that it is built on has one.
# Why it matters: a server that speaks Ollama's dialect must send no blank keep-alive lines. A client of ours
#   needs its own time-out and catches two more kinds of exceptions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile ollama==0.6.3 pydantic==2.14.4 httpx==0.28.1
"$folder/venv/bin/python" - <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import ollama
import pydantic

answer = {}
methods = []


class Server(BaseHTTPRequestHandler):
    """Answer every request by what `answer` holds; /moved is where a redirect leads."""

    def do_POST(self):
        methods.append(self.command)
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        status = 200 if self.path == '/moved' else answer['status']
        self.send_response(status)
        if status == 301:
            self.send_header('Location', '/moved')
        self.send_header('Content-Type', 'application/x-ndjson')
        self.send_header('Content-Length', str(len(answer['body'])))
        self.end_headers()
        self.wfile.write(answer['body'])

    do_GET = do_POST

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = ollama.Client(host=f'http://127.0.0.1:{server.server_port}')


def chat(body, status=200, stream=False):
    """The texts of the answer and the name of the exception that ended it."""
    methods.clear()
    answer.update(body=body.encode(), status=status)
    texts, error = [], None
    try:
        parts = client.chat(model='m', messages=[{'role': 'user', 'content': 'hi'}], stream=stream)
        for part in parts if stream else [parts]:
            texts.append(part.message.content)
    except (ollama.ResponseError, json.JSONDecodeError, pydantic.ValidationError) as raised:
        error = type(raised).__name__
    print(f'status {status}, stream {stream}, {body!r} -> {texts} {error} by {methods}')
    return texts, error


first = '{"message": {"role": "assistant", "content": "one"}, "done": false}\n'
last = '{"message": {"role": "assistant", "content": " two"}, "done": true}\n'
assert chat(first + last, stream=True) == (['one', ' two'], None)
assert chat(first + '\n' + last, stream=True) == (['one'], 'JSONDecodeError')
assert chat(first + '{"error": "no memory"}\n', stream=True) == (['one'], 'ResponseError')
assert chat('{"error": "no memory"}') == ([], 'ValidationError')
assert chat(last, status=301) == ([' two'], None) and methods == ['POST', 'GET']
assert chat('{"error": "busy"}', status=503) == ([], 'ResponseError') and methods == ['POST']
assert client._client.timeout.read is None
PY
