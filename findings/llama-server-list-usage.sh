#!/usr/bin/env bash
# llama.cpp's server of October 2026 (xllamacpp 2026.10.11549), CPU; model: tiny_gguf.py's.
# Seen, POST /v1/completions: (1) a list of three prompts gets three choices, of 4 tokens each, and a usage of 4
#   completion tokens and the tokens of one prompt alone: the usage is that of a single choice. (2) max_tokens=0
#   generates one token, finish_reason "length". (3) max_tokens=2.7 is taken as 2, while "5" is refused.
# A good guess: usage is the sum over the choices, as with OpenAI's API; 0 tokens are no tokens (or a refusal).
# Why it matters: costs and speeds that are computed from usage are too small by the number of prompts. A
#   harness that wants the prompt's probabilities alone (max_tokens=0 with echo) gets a token that it did not
#   ask for.
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
settings.n_ctx = 512
settings.n_parallel = 1
settings.warmup = False
server = xllamacpp.Server(settings)


def complete(prompt, max_tokens):
    body = {'prompt': prompt, 'max_tokens': max_tokens, 'temperature': 0, 'ignore_eos': True}
    reply = requests.post(server.listening_address + '/v1/completions', json=body)
    print(body['prompt'], max_tokens, '->', reply.status_code, [c['text'] for c in reply.json().get('choices', [])],
          reply.json().get('usage'))
    return reply.status_code, reply.json()


prompts = ['a', 'bc', 'def']
singles = [complete(prompt, 4)[1]['usage'] for prompt in prompts]
status, together = complete(prompts, 4)
assert status == 200 and len(together['choices']) == 3
assert [usage['completion_tokens'] for usage in singles] == [4, 4, 4]
assert together['usage']['completion_tokens'] == 4
assert together['usage']['prompt_tokens'] < sum(usage['prompt_tokens'] for usage in singles)

status, none = complete('a', 0)
assert status == 200 and none['usage']['completion_tokens'] == 1
assert none['choices'][0]['finish_reason'] == 'length'
assert complete('a', 2.7)[1]['usage']['completion_tokens'] == 2
assert complete('a', '5')[0] == 400
PY
