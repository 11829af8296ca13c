#!/usr/bin/env bash
# urllib3 2.8.0.
# Seen: Retry(3, status_forcelist=[]), and even the plain number retries=3, sends a GET that is answered 413,
#   429 or 503 with a Retry-After four times. Without that header it is sent once. A POST is sent once unless
#   allowed_methods=None; then it, too, is repeated four times although status_forcelist names other codes. At
#   the end the last answer is returned, where a code of status_forcelist raises MaxRetryError. A 500 with
#   Retry-After is not repeated.
# A good guess: status_forcelist is the list of the codes that are retried, and an empty one retries none.
# Why it matters: a judge that opens up POST (allowed_methods=None) and counts its own tries on top asks four
#   times as often as it says, and waits as long as the server asks for: the number of requests and the time-out
#   are the server's to choose. respect_retry_after_header=False makes status_forcelist the whole list.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile urllib3==2.8.0
"$folder/venv/bin/python" - <<'PY'
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import urllib3
from urllib3 import Retry

asked = []


class Server(BaseHTTPRequestHandler):
    """Answer /503 by 503 and /503/later by 503 with a Retry-After."""

    def do_GET(self):
        asked.append(self.path)
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.send_response(int(self.path[1:4]))
        self.send_header('Content-Length', '0')
        if self.path.endswith('/later'):
            self.send_header('Retry-After', '0')
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()


def count(method, path, retries):
    """How often the request was sent."""
    asked.clear()
    status = urllib3.PoolManager().request(method, f'http://127.0.0.1:{server.server_port}{path}', retries=retries).status
    print(f'{method} {path} {retries}: sent {len(asked)} times, then {status}')
    return len(asked)


for code in (413, 429, 503):
    assert count('GET', f'/{code}', Retry(3, status_forcelist=[])) == 1
    assert count('GET', f'/{code}/later', Retry(3, status_forcelist=[])) == 4
assert count('GET', '/503/later', 3) == 4
assert count('GET', '/500/later', 3) == 1
assert count('POST', '/503/later', Retry(3, status_forcelist=[500])) == 1
assert count('POST', '/503/later', Retry(3, status_forcelist=[500], allowed_methods=None)) == 4
assert count('GET', '/503/later', Retry(3, status_forcelist=[], respect_retry_after_header=False)) == 1
PY
