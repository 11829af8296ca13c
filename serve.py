"""
Serve the tuned model over HTTP, in OpenAI's and in Ollama's dialect, with a page to talk with it.

    python serve.py config/demo.py                                          # then open http://127.0.0.1:8000
    SERVE_API_KEY=secret python serve.py config/demo.py --host=0.0.0.0      # clients send it as bearer token

Answers join and leave the batch between its steps; greedy ones are those of sample.py. These models know one
turn: the last user message is the instruction. Filters mask personal data and rude words, in prompts and in
answers; they are basic, and the README says what they miss.
"""
import asyncio
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch

from config import UserError, configure, init_device
from judge import SCHEMA, Server
from lora import for_inference
from model import GPT, KVCache, ModelError, Row
from prepare import HEAD, PREFIX, TAIL, detokenize, encode_prompt, get_tokenizer
from sample import HEADER_WORDS, find_run, load_before, response_text

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from profanity_check.profanity_check import predict_prob, vectorizer
    from prometheus_client import Counter, Gauge, Histogram, generate_latest
    from pydantic import AliasChoices, BaseModel, Field, ValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from stdnum import iban, luhn
    from stdnum.util import clean
except ImportError as error:
    raise SystemExit(f'serve.py needs {error.name}: pip install -r requirements-serve.txt') from error

# oneDNN and torch would each keep 1,024 products, one for each number of rows: 100 MB in a long run
for cache in 'LRU_CACHE_CAPACITY', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY':
    os.environ.setdefault(cache, '64')

# -----------------------------------------------------------------------------
# model
out_dir = 'out'  # the run: its <model>-sft.pth answers
init_from = 'gpt2-medium'  # where there is no run, or as a flag that names another model: what answers
before = True  # serve the model before fine-tuning, too
weights = 'openai'  # whose files of a GPT-2 name come first: 'openai', 'huggingface'
cache_dir = ''  # where they are kept; empty: gpt2-sft in the user's cache folder
# address
host = '127.0.0.1'
port = 8000  # 0: any free one
without_key = False  # off loopback, let anyone ask, though no SERVE_API_KEY is set
# limits
max_active = 32  # answers that are computed at once, as far as their KV caches fit into 4 GB
queue = 64  # answers that may wait for them
max_new_tokens = 256  # of an answer
max_body = 100_000  # bytes of a request
request_timeout = 120.0  # seconds; what there is then is the answer
# filters
filters = 'pii,profanity'  # 'pii', 'profanity', 'patterns', 'moderator', several with commas; empty: none
patterns = ''  # the file of 'patterns': a regular expression a line
judge = 'ollama'  # the server of 'moderator', as in judge.py: 'ollama', 'openai'
judge_model = 'llama3'
judge_url = ''
# device
device = 'auto'  # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16' (on a CPU of the matrices alone); 'auto': as in train.py
# -----------------------------------------------------------------------------
config = configure(globals())

# --- filters

PHONE = (r'(?<![\w.(-])(?<![0-9] )(?:'
         r'\+[0-9](?:[ ./-]?\(?[0-9]\)?){6,14}'  # +49 (0)30 1234567
         r'|\(0?[0-9]{2,5}\)[ ./-]?[0-9]{2,8}(?:[ .-][0-9]{2,8}){0,3}'  # (555) 123-4567
         r'|0[0-9]{1,5}(?:[ ./-][0-9]{2,8}){1,4}|0[0-9]{9,11}'  # 020 7946 0123
         r'|(?:1[ .-])?[0-9]{3}[ .-][0-9]{3}[ .-][0-9]{4}|[0-9]{3}-[0-9]{4}'  # 555-123-4567
         r')(?![\w-])')
# the words of which alt-profanity-check's classifier is sure, but for some of which it is wrongly so
scores = zip(vectorizer.vocabulary_, predict_prob(list(vectorizer.vocabulary_)))
OFFENSIVE = {word for word, p in scores if p > 0.97} - {'gay', 'queer', 'pig', 'shut', 'hoe', 'penis'}
LEET = str.maketrans('01345@$!', 'oieasasi')
PATTERNS = {  # filter: (kind, regular expression, what else must hold)
    'pii': [
        ('email', r'[^\s@"\'()<>,;:]{1,64}@[^\s@"\'()<>,;:/]{1,63}\.[^\W\d_]{2,24}\b', bool),
        ('IBAN', r'\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b', iban.is_valid),
        ('card', r'(?<![\w.+-])[0-9](?:[ -]?[0-9]){12,18}(?![\w-])', lambda m: luhn.is_valid(clean(m, ' -'))),
        ('phone', PHONE, lambda m: 7 <= sum(map(str.isdigit, m)) <= 15)],
    'profanity': [('offensive', r'\w(?:[\w@$!]*\w)?', lambda m: m.lower().translate(LEET) in OFFENSIVE)],
    'patterns': []}  # the user's, read at the start
LOOPBACK = '127.0.0.1', 'localhost', '::1'
chain = [name.strip() for name in filters.split(',') if name.strip()]

def mask(text):
    """-> the text with [kind] in place of what the filters find."""
    for name in chain:
        for kind, pattern, check in PATTERNS.get(name, []):
            text = re.sub(pattern, lambda m: f'[{kind}]' if check(m[0]) else m[0], text)
    return text

def final_size(text):
    """-> how many characters of an unfinished text are final, since no match can reach over what follows."""
    if {'patterns', 'moderator'} & set(chain) or HEADER_WORDS.startswith(text):
        return 0  # these filters need all of it; and the header is no part of an answer
    if not chain:
        return len(text.rstrip('\ufffd'))  # a character may be of several tokens
    # white space, but for that inside of numbers: it stands between digits, capitals and brackets
    ends = [match.start() for match in re.finditer(r'\n|(?<![0-9A-Z)])\s(?=\S)|\s(?=[^\s0-9A-Z(])', text)]
    return ends[-1] if ends else 0

async def is_refused(text):
    """-> whether there is a moderator that finds the text harmful, or that does not answer."""
    return 'moderator' in chain and await asyncio.to_thread(moderator.finds_harmful, text)

# --- the batches: one for each model and kind of prompt, that of the template and raw ones

models, about, caches, waiting, changed = {}, {}, {}, [], asyncio.Event()
# all of torch runs in this thread: with a second pool of OpenMP threads each step would take a third longer
thread = ThreadPoolExecutor(1)

def n_active():
    return sum(len(cache.rows) for cache in caches.values())

Gauge('active_rows', 'answers that are being computed').set_function(n_active)
Gauge('waiting_rows', 'answers that wait for room').set_function(lambda: len(waiting))
new_tokens = Counter('new_tokens', 'generated')
first_token = Histogram('first_token_seconds', 'from a request to the first token of an answer')

class Answer(Row):
    """A row of a batch. Row's fields change while a step is computed; receive, after it, copies them."""

    def __init__(self, batch, index, stop, top_logprobs, changed, *arguments):
        super().__init__(models[batch[0]].config, *arguments)
        self.batch, self.index, self.stop, self.top_logprobs = batch, index, stop, top_logprobs
        self.changed, self.began, self.first_token = changed, time.monotonic(), 0.0
        self.text, self.new_ids, self.tokens = '', [], []  # tokens: (length of the text with it, logprobs)
        self.sent, self.n_sent = '', 0  # the text that was sent, and of how many tokens
        self.ended = ''  # why, as finish_reason, or 'content_filter'; what has ended leaves the batch

    def receive(self, logprobs):
        """Take over the id of a step. A stop sequence ends the answer before it."""
        if self.ended:  # while the step was computed
            return
        new_tokens.inc()
        if not self.first_token:
            self.first_token = time.monotonic()
            first_token.observe(self.first_token - self.began)
        self.new_ids, self.ended = self.answer, self.ended or self.finish_reason
        if self.finish_reason != 'stop':
            self.text = detokenize(self.new_ids) if self.batch[1] == 'raw' else response_text(self.new_ids)
            # a header that the model repeats is dropped once it is whole, and the text gets shorter
            self.tokens = [(min(end, len(self.text)), one) for end, one in self.tokens]
            self.tokens.append((len(self.text), logprobs))
        places = [self.text.index(stop) for stop in self.stop if stop in self.text]
        if places:
            self.text, self.ended = self.text[:min(places)], 'stop'
        if time.monotonic() - self.began > request_timeout:
            self.ended = self.ended or 'length'
        self.changed.set()

    def take(self):
        """-> the text that became final since the last call, and its logprobs, none where a filter masked."""
        size = len(self.text)
        if not self.ended:
            before_stop = size + 1 - max([len(stop) for stop in self.stop], default=1)
            size = final_size(self.text[:max(before_stop, 0)])
        masked = mask(self.text[:size])
        new_text = masked[len(self.sent):]
        logprobs = [one for end, one in self.tokens if end <= size][self.n_sent:]
        self.sent, self.n_sent = masked, self.n_sent + len(logprobs)
        is_shown = self.top_logprobs >= 0 and masked == self.text[:size]
        return new_text, logprobs if is_shown else None

@torch.inference_mode()
def step(cache, joining):
    """Let the ended leave, and compute a step -> (answer, logprobs) of each that got an id."""
    for answer in [answer for answer in cache.rows if answer.ended]:
        cache.evict(answer)
    if not joining and not cache.rows:
        return []
    with autocast:
        answers, logits = cache.step(joining)
    return [(answer, logprobs_of(answer, its_logits)) for answer, its_logits in zip(answers, logits)]

def logprobs_of(answer, logits):
    """logits (vocab,) -> the new token and the likeliest with their log-probabilities, as OpenAI writes them;
    None: not asked for. Likely ones that a filter masks are left out."""
    if answer.top_logprobs < 0:
        return None
    logprobs, tokens = logits.float().log_softmax(dim=0), []
    ids = [answer.ids[-1], *logprobs.topk(answer.top_logprobs).indices.tolist()]
    for id, logprob in zip(ids, logprobs[ids].tolist()):
        text = get_tokenizer().decode_single_token_bytes(id)
        tokens.append({'token': text.decode(errors='replace'), 'logprob': max(logprob, -9999),
                       'bytes': list(text)})
    return tokens[0] | {'top_logprobs': [one for one in tokens[1:] if mask(one['token']) == one['token']]}

async def compute():
    """The task that computes: steps of all batches, in a thread, so that requests are read meanwhile."""
    while True:
        for batch, cache in caches.items():
            joining = [answer for answer in waiting if answer.batch == batch and not answer.ended]
            joining = joining[:max_active - n_active()]
            waiting[:] = [answer for answer in waiting if not answer.ended and answer not in joining]
            if joining or cache.rows:
                work = thread.submit(step, cache, joining)
                for answer, logprobs in await asyncio.wrap_future(work):
                    answer.receive(logprobs)
                await asyncio.sleep(0)  # requests look at it now: beside a step they would slow it down
        if not waiting and not n_active():
            changed.clear()
            await changed.wait()

# --- a request

class Ask(BaseModel):
    """Of both dialects; Ollama's options are taken as fields."""
    model: str = Field('', validation_alias=AliasChoices('model', 'name'))
    messages: list[dict[str, str | list[dict] | None]] = []
    prompt: str = ''
    input: str = ''  # of the instruction; an extra of ours, as top_k is in OpenAI's dialect
    system: str = ''
    raw: bool = False
    stream: bool | None = None
    stream_options: dict = {}
    n: int = Field(1, ge=1, le=16)
    max_tokens: int = Field(0, validation_alias=AliasChoices(
        'max_tokens', 'max_completion_tokens', 'num_predict'))
    temperature: float = Field(0, ge=0, le=100)
    top_k: int = Field(0, ge=0)
    seed: int = Field(default_factory=lambda: secrets.randbits(31))
    stop: str | list[str] = []
    logprobs: bool | Annotated[int, Field(ge=0)] = False
    top_logprobs: int = Field(0, ge=0, le=20)

NEUTRAL = {  # of settings that are not built OpenAI's clients may send these values
    'top_p': 1, 'frequency_penalty': 0, 'presence_penalty': 0, 'logit_bias': {}, 'tools': [], 'functions': [],
    'response_format': {'type': 'text'}, 'echo': False, 'suffix': ''}

def known(name):
    """-> the name, if a model has it; else HTTPException."""
    if name not in models:
        raise HTTPException(404, f'there is no model {name!r}; there are: {", ".join(models)}')
    return name

async def read(request: Request):
    """-> the body as an Ask. HTTPException: 413 where it is too large, 400 where it is wrong."""
    if int(request.headers.get('content-length', max_body + 1)) > max_body:
        raise HTTPException(413, f'a request needs a Content-Length of at most {max_body:,} bytes')
    try:
        fields = dict(await request.json())
        fields |= dict(fields.get('options') or {})
        fields = {key: value for key, value in fields.items() if value is not None}
        for key, neutral in NEUTRAL.items() if request.url.path.startswith('/v1/') else [('n', 1)]:
            if fields.get(key, neutral) != neutral:
                raise HTTPException(400, f'{key} is not supported: only {neutral!r} is')
        ask = Ask(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        raise HTTPException(400, f'{".".join(map(str, fault["loc"]))}: {fault["msg"]}') from None
    except (ValueError, TypeError, RecursionError, ClientDisconnect):
        raise HTTPException(400, 'the request is not a complete JSON object') from None
    ask.model = known(ask.model.removesuffix(':latest') or next(iter(models)))
    return ask

async def submit(ask, kind, top_logprobs):
    """Filter and tokenize a prompt, and let its answers wait -> the answers. HTTPException: why not."""
    roles = [message.get('role') for message in ask.messages]
    if ask.system or 'system' in roles or 'developer' in roles:
        raise HTTPException(400, 'this model takes no system message: put all into one user message')
    if roles and roles[-1] != 'user':
        raise HTTPException(400, 'the last message must have the role user')
    text = (ask.messages[-1].get('content') or '') if ask.messages else ask.prompt
    if not isinstance(text, str):
        if any(part.get('type') != 'text' for part in text):
            raise HTTPException(400, 'a message may have only parts of type text')
        text = ''.join(str(part.get('text', '')) for part in text)
    if not text.strip():
        raise HTTPException(400, 'there is no instruction')
    row = {'instruction': mask(text), 'input': mask(ask.input)}
    if await is_refused('\n\n'.join(row.values())):
        raise HTTPException(400, 'the moderator refused this prompt, or does not answer')
    ids = get_tokenizer().encode_ordinary(row['instruction']) if kind == 'raw' else encode_prompt(row)
    stop = [ask.stop] if isinstance(ask.stop, str) else ask.stop
    limit = max(ask.max_tokens, 0) or max_new_tokens  # Ollama's num_predict may be -1
    its_changed = asyncio.Event()
    try:
        answers = [Answer((ask.model, kind), i, list(filter(None, stop)), top_logprobs, its_changed, ids,
                          min(limit, max_new_tokens), ask.temperature, ask.top_k, ask.seed + i)
                   for i in range(ask.n)]
    except ModelError as error:
        raise HTTPException(400, str(error)) from error
    if len(waiting) + len(answers) > queue:
        raise HTTPException(503, 'too many requests are waiting', {'Retry-After': '1'})
    waiting.extend(answers)
    changed.set()
    return answers

async def pieces(answers, stream):
    """Yields (answer, its new text, the logprobs of that), as it grows or, if not stream, at its end. When
    the client has gone, starlette cancels this, and the rest is not computed."""
    left, its_changed = list(answers), answers[0].changed
    try:
        while left:
            try:
                async with asyncio.timeout_at(answers[0].began + request_timeout):
                    await its_changed.wait()
            except TimeoutError:  # some may still wait for room
                for answer in left:
                    answer.ended = answer.ended or 'length'
            its_changed.clear()
            for answer in list(left):
                if answer.ended:
                    left.remove(answer)
                    if await is_refused(mask(answer.text)):
                        answer.text, answer.ended, answer.tokens = '', 'content_filter', []
                if stream or answer.ended:
                    text, logprobs = answer.take()
                    if text or answer.ended:
                        yield answer, text, logprobs
    finally:
        for answer in left:
            answer.ended = 'cancelled'

async def check_key(request: Request):
    key, sent = os.environ.get('SERVE_API_KEY'), request.headers.get('authorization', '')
    if not key and not without_key and request.url.hostname not in LOOPBACK:
        raise HTTPException(403, 'under a name other than localhost a key is needed')  # against DNS rebinding
    is_right = not key or secrets.compare_digest(sent.encode(), f'Bearer {key}'.encode())
    if not is_right and request.url.path not in ('/', '/health'):
        raise HTTPException(401, 'the API key is missing or wrong', {'WWW-Authenticate': 'Bearer'})

app = FastAPI(openapi_url=None, dependencies=[Depends(check_key)])

@app.exception_handler(HTTPException)
async def on_error(request, error):
    is_ollama, text = request.url.path.startswith('/api/'), error.detail
    content = text if is_ollama else {'message': text, 'type': 'error', 'code': error.status_code}
    return JSONResponse({'error': content}, error.status_code, error.headers)

@app.post('/v1/completions')
@app.post('/v1/chat/completions')
@app.post('/api/generate')
@app.post('/api/chat')
async def generate(request: Request, ask: Annotated[Ask, Depends(read)]):
    path = request.url.path
    is_chat, is_ollama = 'chat' in path, path.startswith('/api/')
    stream = ask.stream is not False if is_ollama else bool(ask.stream)
    if is_ollama and not ask.messages and not ask.prompt:  # so its clients load a model
        return {'model': ask.model, 'created_at': now(), 'response': '', 'done': True, 'done_reason': 'load',
                'message': {'role': 'assistant', 'content': ''}}
    top = -1
    if not is_ollama and ask.logprobs is not False:  # of completions it is the number itself
        top = ask.top_logprobs if ask.logprobs is True else min(ask.logprobs, 20)
    answers = await submit(ask, 'template' if is_chat or is_ollama and not ask.raw else 'raw', top)
    to_json = ollama_json if is_ollama else openai_json
    bodies = to_json(ask, answers, is_chat, stream, pieces(answers, stream))
    headers = {'X-Messages-Left-Out': str(len(ask.messages) - 1)} if len(ask.messages) > 1 else {}
    form, kind = ('{}\n', 'application/x-ndjson') if is_ollama else ('data: {}\n\n', 'text/event-stream')
    if not stream:
        form, kind = '{}', 'application/json'

    async def lines():
        async for body in bodies:
            yield form.format(json.dumps(body))
        yield form.format('[DONE]') if stream and not is_ollama else ''
    return StreamingResponse(lines(), media_type=kind, headers=headers)

# --- OpenAI's dialect

def logprobs_json(tokens, is_chat):
    if is_chat:
        return {'content': tokens}
    tops = [{one['token']: one['logprob'] for one in token['top_logprobs']} for token in tokens]
    return {'tokens': [token['token'] for token in tokens], 'top_logprobs': tops,
            'token_logprobs': [token['logprob'] for token in tokens]}

async def openai_json(ask, answers, is_chat, stream, pieces):
    """Yields chunks or, if not stream, the whole."""
    kind = ('chat.completion.chunk' if stream else 'chat.completion') if is_chat else 'text_completion'
    head = {'id': 'cmpl-' + secrets.token_hex(12), 'object': kind, 'created': int(time.time()),
            'model': ask.model}
    choices = []
    async for answer, text, logprobs in pieces:
        message = {'content': text} | ({'role': 'assistant'} if answer.sent == text else {})  # once
        content = {'delta' if stream else 'message': message} if is_chat else {'text': text}
        choices.append({'index': answer.index, **content, 'finish_reason': answer.ended or None,
                        'logprobs': logprobs_json(logprobs, is_chat) if logprobs else None})
        if stream:
            yield head | {'choices': choices[-1:]}
    read, written = answers[0].prompt_size, sum(len(answer.new_ids) for answer in answers)
    usage = {'prompt_tokens': read, 'completion_tokens': written, 'total_tokens': read + written}
    if not stream:
        yield head | {'choices': sorted(choices, key=lambda choice: choice['index']), 'usage': usage}
    elif ask.stream_options.get('include_usage'):
        yield head | {'choices': [], 'usage': usage}

@app.get('/v1/models/{name}')
async def model_json(name: str):
    digest = about[known(name)]['digest']
    return {'id': name, 'object': 'model', 'created': started, 'owned_by': 'gpt2-sft', 'root': digest}

@app.get('/v1/models')
async def models_json():
    return {'object': 'list', 'data': [await model_json(name) for name in models]}

# --- Ollama's dialect

def now():
    return datetime.now(UTC).isoformat()

async def ollama_json(ask, answers, is_chat, stream, pieces):
    """Yields parts, the last with figures or, if not stream, that one alone."""
    async for answer, text, _ in pieces:
        content = {'message': {'role': 'assistant', 'content': text}} if is_chat else {'response': text}
        part = {'model': ask.model, 'created_at': now(), **content, 'done': bool(answer.ended)}
        if answer.ended:
            end = time.monotonic()
            ns = [int(1e9 * (t - answer.began)) for t in (answer.first_token or end, end)]
            part |= {'done_reason': answer.ended, 'total_duration': ns[1], 'load_duration': 0,
                     'prompt_eval_count': answer.prompt_size, 'prompt_eval_duration': ns[0],
                     'eval_count': len(answer.new_ids), 'eval_duration': ns[1] - ns[0]}
        yield part

app.get('/api/version')(lambda: {'version': '0.1.0'})
app.get('/api/tags')(lambda: {'models': list(about.values())})

@app.post('/api/show')
async def show(ask: Annotated[Ask, Depends(read)]):
    return about[ask.model]

# --- the page, and what operators look at

@app.api_route('/', methods=['GET', 'HEAD'])  # Ollama's command asks by HEAD whether a server runs
async def page():
    nonce = secrets.token_urlsafe(16)
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    text = Path(__file__).with_name('web').joinpath('chat.html').read_text(encoding='utf-8')
    return HTMLResponse(text.replace('NONCE', nonce), headers={'Content-Security-Policy': policy})

app.get('/health')(lambda: {'status': 'ok'})
app.get('/metrics')(lambda: PlainTextResponse(generate_latest()))

# --- start

@torch.inference_mode()
def load_models():
    """Fill the dicts of models: with the run's and what it came from, or the one that init_from names."""
    run = find_run(out_dir, init_from)
    model = GPT.from_pretrained(run.with_suffix('.pth') if run else init_from, cache_dir, weights)
    models[run.stem if run else model.config.name] = model
    if run and before:
        made = json.loads(run.read_text(encoding='utf-8'))
        models[run.stem.removesuffix('-sft') + '-before'] = load_before(made, cache_dir, weights)
    for name, model in models.items():
        size = sum(p.numel() for p in model.parameters())
        hashes = b''.join(hashlib.sha256(p.numpy()).digest() for p in model.parameters())
        about[name] = {  # in Ollama's dialect
            'name': name, 'model': name, 'modified_at': now(), 'size': 4 * size,
            'digest': hashlib.sha256(hashes).hexdigest(),
            'details': {'format': 'pytorch', 'family': 'gpt2', 'families': ['gpt2'], 'parent_model': '',
                        'parameter_size': f'{size / 1e6:.0f}M', 'quantization_level': 'F32'},
            'model_info': {'general.architecture': 'gpt2', 'gpt2.context_length': model.config.block_size},
            'template': HEAD + '{{ .Prompt }}' + TAIL, 'capabilities': ['completion']}
        place(model)
        with autocast:
            caches[name, 'template'] = KVCache(model, get_tokenizer().encode_ordinary(PREFIX))
            caches[name, 'raw'] = KVCache(model, [])

if __name__ == '__main__':
    if not set(chain) <= {*PATTERNS, 'moderator'} or ('patterns' in chain) != bool(patterns):
        raise UserError(f'filters={filters!r} may name pii, profanity, moderator, and patterns with a file, '
                        'like --patterns=mine.txt')
    if min(max_active, queue, max_new_tokens, max_body, request_timeout) <= 0:
        raise UserError('max_active, queue, max_new_tokens, max_body and request_timeout are above 0')
    try:
        lines = Path(patterns).read_text(encoding='utf-8').splitlines() if patterns else []
        PATTERNS['patterns'] = [('masked', re.compile(line), bool) for line in lines if line.strip()]
    except (OSError, ValueError, re.error) as error:
        raise UserError(f'cannot use patterns={patterns!r}: {error}') from error

    # the address; from outside it is reached with a key
    if not (host in LOOPBACK or os.environ.get('SERVE_API_KEY') or without_key):
        raise UserError(f'{host} may be reached from outside: set SERVE_API_KEY in the environment, or, to '
                        'let anyone ask, --without_key=True')
    try:
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        # or a reply of two packets waits 40 ms for the client's acknowledgement; accepted sockets inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, OverflowError) as error:
        raise UserError(f'cannot listen on {host}, port {port}: {error}; set --host or --port') from error

    # the models
    device, compute_dtype, _, _ = init_device(device, dtype)
    place, autocast = for_inference(device, compute_dtype)
    thread.submit(load_models).result()
    max_active = min(max_active, *(c.max_rows(c.model.config.block_size) for c in caches.values()))
    started = int(time.time())

    # what the filters need
    if 'moderator' in chain:
        moderator = Server(judge, judge_model, judge_url, request_timeout)
        moderator.check()
        moderator.load(moderator.body('Hello.', SCHEMA, 123))

    # SIGTERM and Ctrl-C: no new connections, those who wait are answered, exit status 0
    server = uvicorn.Server(uvicorn.Config(app, log_level='warning', access_log=False, lifespan='off',
                                           timeout_graceful_shutdown=request_timeout))
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)  # uvicorn handles them, and raises them again at the end

    async def run_until_one_ends():
        tasks = [asyncio.create_task(server.serve(sockets=[listener])), asyncio.create_task(compute())]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()  # raises what ended compute: too little memory, say

    print(f'{", ".join(models)}: http://{host}:{port or listener.getsockname()[1]}', flush=True)
    asyncio.run(run_until_one_ends())
