#!/usr/bin/env bash
# llama.cpp's server of October 2026 (xllamacpp 2026.10.11549), CPU; model: a random GPT-2 of two blocks, made
#   here.
# Seen: POST /v1/chat/completions whose last message is the assistant's: the server goes on with that message
#   (no header of a new turn), and message.content of its reply begins with the client's own text;
#   usage.completion_tokens counts the new tokens alone, and max_tokens limits these alone.
# A good guess: either a new assistant turn is opened, or the text is continued and only the continuation comes
#   back, as from a completion.
# Why it matters: a client that appends the reply to what it sent has the start twice; a judge that prefills
#   '{"score":' can parse the reply as it is here and nowhere else; tokens counted from the text and from usage
#   differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 requests==2.34.2
"$folder/venv/bin/python" "$(dirname "$0")/tiny_gguf.py" "$folder/model.gguf"
FOLDER="$folder" "$folder/venv/bin/python" - 2> "$folder/log" <<'PY'
import os

import requests
import xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = os.environ['FOLDER'] + '/model.gguf'
settings.n_ctx = 256
settings.n_parallel = 1
settings.warmup = False
server = xllamacpp.Server(settings)
url = server.listening_address
sent = 'The answer is'
messages = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': sent}]
prompt = requests.post(url + '/apply-template', json={'messages': messages}).json()['prompt']
reply = requests.post(url + '/v1/chat/completions', json={'messages': messages, 'max_tokens': 5, 'temperature': 0}).json()
content = reply['choices'][0]['message']['content']
print(f'prompt {prompt!r}')
print(f'sent {sent!r}, came back {content!r}, usage {reply["usage"]["completion_tokens"]} completion tokens')
assert prompt == 'user: hi\nassistant: The answer is'
assert content.startswith(sent)
assert len(content) > len(sent)
assert reply['usage']['completion_tokens'] == 5
PY
