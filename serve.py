"""
Serve the tuned model over HTTP, in OpenAI's and in Ollama's dialect, with a page to talk with it.

    python serve.py config/demo.py                                          # then open http://127.0.0.1:8000
    SERVE_API_KEY=secret python serve.py config/demo.py --host=0.0.0.0      # clients send it as bearer token

Concurrent requests share the steps of an engine (continuous batching); greedy answers are those of sample.py.
The models are single-turn: the last question is the instruction, system messages go into the input. Filters
mask personal data and rude words, in prompts and in answers.

Sections: filters, the engine's thread, a request, OpenAI's dialect, Ollama's dialect, the page, start.
"""
import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from config import UserError, configure, read_json
from engine import (
    Engine,
    KVCache,
    Sequence,
    check_prompt,
    choose_device,
    for_inference,
    return_freed_memory,
)
from model import ModelError
from prepare import (
    BEFORE_INSTRUCTION,
    RESPONSE_HEADER,
    SYSTEM,
    USER,
    VOCAB_SIZE,
    Fault,
    detokenize,
    encode_prompt,
    get_tokenizer,
    prefix_ids,
    read_split,
    text_of,
)
from sample import find_examples, find_run, load_base, load_named, load_run, response_text

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from stdnum import iban, luhn
from uvicorn.protocols.http.h11_impl import H11Protocol

# by default oneDNN and torch each cache 1,024 kernels, one for each number of rows: 100 MB in a long run
for cache in 'LRU_CACHE_CAPACITY', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY':
    os.environ.setdefault(cache, '64')

# -----------------------------------------------------------------------------
# model
out_dir = 'out'  # the run: its <model>-sft.pth answers
init_from = 'gpt2-medium'  # what answers where there is no run, or as a flag if it is not the run's base
before = True  # also serve the model before fine-tuning
download_from = 'openai'  # whose files of gpt2* are tried first [openai | huggingface]
cache_dir = ''  # where downloaded weights are kept; empty: gpt2-sft in the user's cache folder
# address
host = '127.0.0.1'
port = 8000  # 0: any free one
without_key = False  # off loopback, let anyone ask, though no SERVE_API_KEY is set
# limits
max_active = 32  # answers that a model computes at once, as far as there is room in its cache [>= 1]
queue = 64  # answers that may wait for them [>= 1]
cache_gb = 4.0  # keys and values of all models together [> 0]
max_new_tokens = 256  # of an answer [>= 1]
max_body = 100_000  # bytes of a request [>= 1]
request_timeout = 120.0  # seconds, after which an answer is cut [> 0]
# filters
filters = 'pii,profanity'  # pii, profanity, patterns, several with commas; empty: none
patterns = ''  # the file of 'patterns': a regular expression a line
# device
device = 'auto'  # [auto | cpu | cuda | mps]
dtype = 'auto'  # auto: the GPU's best on cuda, else float32 [auto | float32 | bfloat16 | float16]
# -----------------------------------------------------------------------------
config = configure(globals())

PREFILL_SIZE = 256  # ids of prompts in a step, beside those of the answers that are under way
READ_SECONDS = min(20, request_timeout)  # in which a request's head must come, and its body
IDLE_SECONDS = 5  # without work, after which the caches are given back
LOOPBACK = '127.0.0.1', 'localhost', '[::1]'

# -----------------------------------------------------------------------------
# filters: what looks like personal data must be confirmed by check digits, by its length or by a word near it

SPACE = '[ \u00a0\u202f]'  # two of them do not break a line
EMAIL = re.compile(r"""[^\s@"'()<>,;:\[\]]{1,64}(?:@|[\[(]at[\])])[^\s@"'()<>,;:/\[\]]{1,63}"""
                   r'(?:\.|[\[(]dot[\])])[^\W\d_]{2,24}\b')
IBAN = re.compile(
    rf'(?<![A-Za-z0-9])[A-Za-z]{{2}}[0-9]{{2}}(?:(?:{SPACE}|-)?[A-Za-z0-9]){{11,30}}(?![A-Za-z0-9])')
# groups of at least four digits, but for the last one
CARD = re.compile(rf'(?<!\w)(?<![0-9][.,])[0-9]{{4,19}}(?:(?:{SPACE}|[.-])[0-9]{{4,19}}){{0,4}}'
                  rf'(?:(?:{SPACE}|[.-])[0-9]{{1,3}})?(?![A-Za-z0-9])')
BRAND = re.compile('4.{12}|4.{15}|3[47].{13}|3[0689].{12}|(?:2[2-7]|35|5.|6.).{14}')  # without rare lengths
# numbers that a clear form tells: +49 30 1234567, (555) 123-4567, 020 7946 0123, 555-123-4567
DIGIT = rf'(?:(?:{SPACE}|[./-]){{0,2}}\(?[0-9]\)?)'
PHONE = re.compile(rf"""(?<![\w.(+/-])(?:
    \+[1-9]{DIGIT}{{7,14}}
    | (?<![0-9]\ )00[1-9]{DIGIT}{{8,14}}
    | \([2-9][0-9]{{2}}\){SPACE}?[0-9]{{3}}[ .-]?[0-9]{{4}}
    | \(0[0-9]{{1,5}}\)[ ./-]?[0-9]{{2,8}}(?:[ .-][0-9]{{2,8}}){{0,3}}
    | (?<![0-9]\ )0[1-9][0-9]{{0,4}}(?:(?:{SPACE}|[./-])[0-9]{{2,8}}){{1,4}}(?!\ [0-9]{{1,2}}\b)
    | (?:1[ .-])?[2-9][0-9]{{2}}([.-])[0-9]{{3}}\1[0-9]{{4}}
    )(?![\w]|[./-][0-9])""", re.VERBOSE)
# numbers that only a word before them tells from any other
BARE_PHONE = re.compile(rf'(?<![\w.(+/-])\(?[0-9](?:(?:{SPACE}|[./-])?[()]?[0-9]){{6,13}}(?![\w]|[./-][0-9])')
PHONE_WORD = re.compile(
    r'(?:\b(?:call|dial|ring|phone|telephone|tel|mobile|landline|fax|sms|whatsapp|hotline|helpline|voicemail'
    r'|(?:text|reach) (?:me|us|him|her)|my (?:number|cell)|pick up|telefon|handy|rufnummer|ruf|anruf'
    r'|téléphone|mon portable|appel|joindre|teléfono|móvil|llam|llám)\w*|☎)[^!?\n]{0,30}$', re.IGNORECASE)
NO_PHONE = re.compile(
    r'(?<![0-9.])[0-9]{1,2}([./-])[0-9]{1,2}\1(?:[0-9]{4}|[0-9]{2})(?!\1?[0-9])'  # 17.05.2024, 5/17/24
    r'|[0-9]{4}([./-])[0-9]{2}\2[0-9]{2}'  # 2024-05-17
    r'|[0-9]{1,2}\.[0-9]{2}-[0-9]{1,2}\.[0-9]{2}'  # 08.30-17.00
    r'|\b(?:19|20)[0-9]{2}[/-](?:19|20)[0-9]{2}\b'  # 1990-2000
    r'|\b[1-9][0-9]*0-[1-9][0-9]*00\b')  # 500-1000
UNCLEAR = re.compile(r'\+.*|[0-9]+|[0-9]{1,3}(?:[ .\u00a0\u202f][0-9]{3})+')  # may be amounts, +1 000 000
WORD = re.compile(r'(?<!\w)\w(?:[\w@$!]{0,40}\w)?')
LEET = str.maketrans('01345@$!', 'oieasasi')
RUDE = set((Path(__file__).parent / 'data/rude_words.txt').read_text(encoding='utf-8').splitlines())


def whole_size(match):
    return len(match[0])


def valid_size(is_valid):
    """
    A function: a match -> how many of its first characters are valid, 0 if none. They end at the end of a
    group, since words, a date or a CVV may follow.
    """
    def size_of(match):
        for group in re.finditer('[A-Za-z0-9]+', match[0]):
            if is_valid(match[0][:group.end()]):
                return group.end()
        return 0
    return size_of


def is_iban(text):
    """By the country's length and the check digits."""
    return iban.is_valid(text, check_country=False)


def is_card(text):
    digits = re.sub('[^0-9]', '', text)
    return bool(BRAND.fullmatch(digits)) and luhn.is_valid(digits)


def phone_size(match):
    fewest = 9 if UNCLEAR.fullmatch(match[0]) else 7
    if match[0].startswith('0'):
        fewest = 10
    n_digits = len(re.sub('[^0-9]', '', match[0]))
    return len(match[0]) if fewest <= n_digits <= 15 and not NO_PHONE.search(match[0]) else 0


def bare_phone_size(match):
    is_told = PHONE_WORD.search(match.string, max(0, match.start() - 60), match.start())
    return phone_size(match) if is_told else 0


def rude_size(match):
    word = match[0].lower()
    is_number = re.fullmatch('[0-9]+[a-z]{0,2}', word)  # 45s is a time
    return len(word) if not is_number and word.translate(LEET) in RUDE else 0


FINDERS = {  # filter: (kind, pattern, how many characters of a match are of this kind)
    'pii': [('email', EMAIL, whole_size), ('IBAN', IBAN, valid_size(is_iban)),
            ('card', CARD, valid_size(is_card)), ('phone', PHONE, phone_size),
            ('phone', BARE_PHONE, bare_phone_size)],
    'profanity': [('offensive', WORD, rude_size)],
    'patterns': [],  # the user's, read at the start
}
chain = [name.strip() for name in filters.split(',') if name.strip()]


def replace(kind, pattern, size_of, text):
    """The text with [kind] in place of what is found; the search goes on within a match that is none."""
    match = pattern.search(text)
    while match:
        end = match.start()
        size = size_of(match)
        if size:
            text = f'{text[:end]}[{kind}]{text[end + size:]}'
            end += len(kind)
        # a pattern of the user's may match nothing at all, again and again at the end
        match = end < len(text) and pattern.search(text, end + 1)
    return text


def mask(text, found=None):
    """The text with [kind] in place of what the filters find. found: a set that gets these kinds."""
    for name in chain:
        for kind, pattern, size_of in FINDERS[name]:
            masked = replace(kind, pattern, size_of, text)
            if found is not None and masked != text:
                found.add(kind)
            text = masked
    return text


# what may still become a match at the end of a text: the last word; if it begins like a number, also what of
# one may stand before it (read backwards). And an IBAN, which may hold words
LAST = re.compile(r'\s*(?:\S*[0-9()+./-](?=\s|$)[0-9()+./\u00a0\u202f -]*)*\S*')
IBAN_BEGUN = re.compile(
    rf'(?<![A-Za-z0-9])[A-Za-z]{{2}}[0-9]{{2}}(?:(?:{SPACE}|-)?[A-Za-z0-9]){{0,29}}{SPACE}?$')


def final_size(text):
    """How many characters of an unfinished text are final: no match can reach over their end."""
    if 'patterns' in chain or RESPONSE_HEADER.strip().startswith(text):
        return 0  # patterns may need all of it; and a header is no part of an answer
    if not chain:
        return len(text.rstrip('\ufffd'))  # a character may be of several tokens
    # for example 'or pay' is final in 'or pay with 4111 1111': more digits may come
    size = len(text) - LAST.match(text[::-1]).end()
    begun = IBAN_BEGUN.search(text[:size], max(0, size - 70))
    if begun:
        size = begun.start()
    # the space before the rest belongs to its first token
    return size - 1 if text[:size][-1:].isspace() else size


# -----------------------------------------------------------------------------
# the engine's thread: answers, and the steps that compute them

served = {}  # name: ServingEngine
# all of torch runs in this thread: with a second pool of OpenMP threads each step would take a third longer
thread = ThreadPoolExecutor(1)


def over_engines(count):
    """A function that adds up what count(engine) gives for each of them."""
    return lambda: sum(map(count, served.values()))


n_waiting = over_engines(lambda engine: len(engine.scheduler.waiting))
Gauge('waiting_rows', 'answers that wait for room').set_function(n_waiting)
Gauge('active_rows', 'answers that are being computed').set_function(
    over_engines(lambda engine: len(engine.scheduler.running)))
Gauge('cache_bytes', 'keys and values').set_function(
    over_engines(lambda engine: sum(layer.nbytes for layer in engine.cache.layers)))
new_tokens = Counter('new_tokens', 'generated')
first_token_seconds = Histogram('first_token_seconds', 'from a request to the first token of an answer')


class Answer(Sequence):
    """
    One answer. Sequence's fields change in the engine's thread while a step is computed; requests read the
    others, which on_token sets between two steps.
    """

    def __init__(self, config, asked, prompt, is_raw, index, changed):
        # the n answers to a prompt differ by their seeds
        limit = max_new_tokens if asked.max_tokens < 0 else min(asked.max_tokens, max_new_tokens)
        seed = asked.seed + index % asked.n
        super().__init__(config, prompt, max(limit, 1), asked.temperature, asked.top_k, seed)
        self.index = index  # among the answers of its request
        # the engine computes an id in any case; with max_tokens=0 the prompt alone is asked for
        self.wants_none = limit == 0
        self.is_raw = is_raw  # the prompt is continued as it is; else it was put into the template
        self.stop = asked.stop
        self.n_top = asked.n_top
        self.echo = detokenize(prompt) if asked.echo and is_raw else ''
        # the records of the prompt's tokens, if it is scored. Nothing tells how likely the first one is
        self.prompt_tokens = [token_record(prompt[0], None) | {'top_logprobs': []}]
        self.changed = changed  # an event
        self.began = time.monotonic()
        self.first_token = 0.0
        self.text = self.echo
        self.tokens = []  # (length of the text with it, its record)
        self.n_new = 0
        self.sent = ''  # the text that was sent, masked, and of how many tokens
        self.n_sent = 0
        self.bytes_sent = b''  # of the tokens that were told
        self.ended = ''  # why: stop, length, error or cancelled
        self.error = ''

    @property
    def scores_prompt(self):
        """Whether log-probabilities of the prompt are still missing."""
        return bool(self.echo) and self.n_top >= 0 and len(self.prompt_tokens) < self.n_prompt

    def on_token(self, record):
        """Take over the id of a step and its record, or the exception that the answer ended with."""
        if self.ended:  # while the step was computed
            return
        self.changed.set()
        if isinstance(record, Exception):
            self.error = str(record).partition('\n')[0] or type(record).__name__
            self.ended = 'error'
            return
        # with the first new id the whole prompt has been read
        new_tokens.inc()
        if not self.first_token:
            self.first_token = time.monotonic()
            first_token_seconds.observe(self.first_token - self.began)
            if self.echo:
                self.tokens = [(len(self.echo), earlier) for earlier in self.prompt_tokens]
        if self.wants_none:
            self.ended = 'length'
            return
        # all new ids are decoded again, since a character may be of several tokens
        self.ended = self.finish_reason
        new_ids = self.new_ids
        self.n_new = len(new_ids)
        self.text = self.echo + (detokenize(new_ids) if self.is_raw else response_text(new_ids))
        # a header that the model repeats is dropped once it is whole, and the text gets shorter
        self.tokens = [(min(end, len(self.text)), earlier) for end, earlier in self.tokens]
        if self.is_raw or self.finish_reason != 'stop':
            self.tokens.append((len(self.text), record))
        # a stop sequence ends the answer before it
        places = [self.text.find(stop, len(self.echo)) for stop in self.stop]
        found = [place for place in places if place >= 0]
        if found:
            self.text = self.text[:min(found)]
            self.ended = 'stop'

    def take(self):
        """The Piece that is final since the last call; its tokens are None where a filter masked."""
        size = len(self.text)
        if not self.ended:
            # the end of the text may be the beginning of a stop sequence
            longest = max(map(len, self.stop), default=1)
            size = final_size(self.text[:max(size - longest + 1, 0)])
        # the text from its beginning is masked, since what stands before a number tells what it is
        masked = mask(self.text[:size])
        text = masked[len(self.sent):]
        if not self.ended and not (text and self.first_token):
            return None
        is_first = not self.sent
        self.sent = masked
        tokens = [record for end, record in self.tokens if end <= size][self.n_sent:]
        self.n_sent += len(tokens)
        # tokens would show what is masked
        is_shown = self.n_top >= 0 and masked == self.text[:size]
        return Piece(self, text, tokens if is_shown else None, is_first, False)


class Piece(NamedTuple):
    answer: Answer
    text: str
    tokens: list | None  # their records
    is_first: bool
    is_last: bool


def token_record(id, logprob):
    """An id and its log-probability as OpenAI's dialect writes them; of a part of a character the bytes."""
    data = get_tokenizer().decode_single_token_bytes(id)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)
    return {'token': text, 'logprob': logprob, 'bytes': list(data)}


def score(ids, logits, n_top):
    """Records of ids by their logits (n, vocab), each with the n_top likeliest that no filter masks."""
    logprobs = logits.float().log_softmax(dim=1).clamp(min=-9999)  # JSON has no infinity
    likeliest = logprobs.topk(n_top)
    records = []
    for i, id in enumerate(ids):
        tops = map(token_record, likeliest.indices[i].tolist(), likeliest.values[i].tolist())
        shown = [top for top in tops if mask(top['token']) == top['token']]
        records.append(token_record(id, logprobs[i, id].item()) | {'top_logprobs': shown})
    return records


class ServingEngine(Engine):
    """
    An Engine that survives a step that fails, and records the log-probabilities of tokens. Requests append to
    the waiting sequences; all else happens in the engine's thread. about: the model as Ollama's dialect lists
    it. examples: rows that the page offers.
    """

    def __init__(self, model, cache_bytes, about, examples):
        # the template's words before the instruction are computed once, here
        prefix = prefix_ids()[:model.config.block_size - 1]
        super().__init__(model, prefix, cache_bytes, max_active, max_active + PREFILL_SIZE)
        self.about = about
        self.examples = examples
        self.changed = asyncio.Event()  # set when there is something to compute

    def compute(self, batch):
        logits = super().compute(batch)
        sizes = [n_ids for _, n_ids in batch]
        for (answer, n_ids), hidden in zip(batch, self.hidden.split(sizes)):
            if answer.scores_prompt:
                self.score_prompt(answer, answer.n_cached - n_ids, hidden)
        return logits

    def score_prompt(self, answer, start, hidden):
        """Record the log-probabilities of a piece of a prompt: each position tells those of the next id."""
        n_scored = len(answer.prompt_tokens)
        if start >= n_scored:
            hidden = torch.cat([self.prefix_hidden, hidden])  # the engine did not compute the prefix again
        ids = answer.ids[n_scored:min(answer.n_cached + 1, answer.n_prompt)]
        answer.prompt_tokens += score(ids, self.model.logits(hidden[:len(ids)]), answer.n_top)

    @torch.no_grad()
    def step_safely(self):
        """A step without those that ended: [(answer, the record of its new id, or why it failed)]."""
        answers = []
        try:
            for answer in [*self.scheduler.running, *self.scheduler.waiting.copy()]:
                if answer.ended:
                    self.remove(answer)
            # log-probabilities take a while over all the vocabulary: only where they are asked for
            answers, logits = self.step()
            found = []
            for i, answer in enumerate(answers):
                record = None
                if answer.n_top >= 0:
                    record = score(answer.ids[-1:], logits[i:i + 1], answer.n_top)[0]
                found.append((answer, record))
            return found
        except Exception as error:
            traceback.print_exc()
            # those whose last id is there have left the scheduler: nothing would compute them again
            have_left = [(answer, error) for answer in answers if answer.finish_reason]
            return have_left + self.start_again(error)

    def start_again(self, error):
        """
        After a step that failed half as many answers run at once, and all keys and values are computed anew.
        The newest go first, since they may be the cause. An answer that fails alone ends with the error, and
        then as many as before run at once again.
        """
        # keys and values are forgotten, since a step that failed has written a part of them
        running = self.scheduler.running[:]
        self.clear()
        if len(running) == 1:
            self.scheduler.max_running = max_active
            return [(running[0], error)]
        self.scheduler.max_running = max(len(running) // 2, 1)
        self.scheduler.waiting.extendleft(running)
        return []

    def clear(self):
        """Forget the sequences that run, and all keys and values."""
        self.cache = KVCache(self.model.config, self.device, self.cache.layers[0].dtype)
        for answer in self.scheduler.running:
            answer.n_cached = 0
            del answer.prompt_tokens[1:]
        self.scheduler.running.clear()

    def rest(self):
        """Give the memory of the cache back."""
        self.clear()
        self.scheduler.max_running = max_active
        return_freed_memory()


async def compute(engine):
    """The task that computes the steps of an engine, in the thread; requests are read meanwhile."""
    while True:
        while engine.has_work():
            for answer, record in await run_in_thread(engine.step_safely):
                answer.on_token(record)
            await asyncio.sleep(0)  # requests look at it now: beside a step they would slow it down
        # without work the thread sleeps, and after a while the memory is given back
        engine.changed.clear()
        try:
            await asyncio.wait_for(engine.changed.wait(), IDLE_SECONDS)
        except TimeoutError:
            await run_in_thread(engine.rest)
            await engine.changed.wait()


def run_in_thread(function):
    return asyncio.wrap_future(thread.submit(function))


# -----------------------------------------------------------------------------
# a request

class GenerateRequest(BaseModel):
    """The fields of both dialects that are supported; Ollama's options are taken as fields."""
    model: str = ''
    messages: list[dict[str, Any]] = []
    prompt: str | list[str] | list[int] | list[list[int]] = ''
    input: str = ''  # of the instruction; an extra of ours, as top_k is in OpenAI's dialect
    system: str = ''
    images: list = []
    raw: bool = False
    echo: bool = False
    stream: bool | None = None
    stream_options: dict = {}
    n: int = Field(1, ge=1)
    max_tokens: int = -1  # below 0: the server's limit
    temperature: float = Field(0, ge=0, le=100)
    top_k: int = 0
    seed: int = -1
    stop: str | list[str] = []
    logprobs: bool | Annotated[int, Field(ge=0)] = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def n_top(self):
        """How many alternatives of each token are asked for; -1: not even the tokens."""
        if self.logprobs is False:
            return -1
        return self.top_logprobs if self.logprobs is True else min(self.logprobs, 20)


RENAMED = {'name': 'model', 'max_completion_tokens': 'max_tokens', 'num_predict': 'max_tokens'}
# settings that are not supported: with these values, or without any, they would change nothing
NEUTRAL = {'top_p': 1, 'repeat_penalty': 1, 'typical_p': 1, 'best_of': 1, 'response_format': {'type': 'text'}}


def find_model(name):
    """The name by which a model is served; with Ollama's tag, too. HTTPException: there is none."""
    name = name.removesuffix(':latest') or next(iter(served))
    if name not in served:
        raise HTTPException(404, f'there is no model {name!r}; there are: {", ".join(served)}')
    return name


async def read_body(request):
    """The fields of a request's JSON. HTTPException: it is too large, too slow or wrong."""
    # the length is counted, since a body in chunks does not say its own
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_body:
                    raise HTTPException(413, f'a request may have {max_body:,} bytes')
        fields = json.loads(body)
        options = fields.pop('options', None) or {}
        if not isinstance(options, dict):
            raise TypeError
        fields |= options
    except TimeoutError:
        raise HTTPException(408, 'the request did not come in time', {'Connection': 'close'}) from None
    except (ValueError, TypeError, AttributeError, RecursionError, ClientDisconnect):
        raise HTTPException(400, 'the request is not a complete JSON object') from None
    return {RENAMED.get(key, key): value for key, value in fields.items() if value is not None}


async def parse_request(request, headers):
    """A request -> a GenerateRequest. headers: of the reply, in which settings that are ignored are named."""
    fields = await read_body(request)
    known = GenerateRequest.model_fields.keys()
    if is_ollama(request):
        known -= {'n', 'echo'}
    # a key from outside must not break the header
    ignored = []
    for key in fields.keys() - known:
        value = fields.pop(key)
        if value and value != NEUTRAL.get(key):
            ignored.append(re.sub(r'[^\w.-]', '?', key, flags=re.ASCII)[:40])
    if ignored:
        headers['X-Ignored'] = ', '.join(sorted(ignored)[:20])
    try:
        asked = GenerateRequest(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        raise HTTPException(400, f'{".".join(map(str, fault["loc"]))}: {fault["msg"]}') from None
    # what may be written in several ways is written in one
    asked.model = find_model(asked.model)
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    asked.stop = [stop for stop in stops if stop]
    asked.top_k = max(asked.top_k, 0)
    if asked.seed < 0:
        asked.seed = secrets.randbits(31)
    return asked


def template_prompt(asked, headers, masked):
    """
    The ids of a chat or of Ollama's generate. As prepare.py reads chats, system messages come before the
    input; of the turns the last question is what the model answers. HTTPException: there is none.
    """
    messages = asked.messages or [{'role': 'user', 'content': asked.prompt}]
    turns = [message for message in messages if message.get('role') not in SYSTEM]
    question = []
    try:
        system = [text_of(message) for message in messages if message.get('role') in SYSTEM]
        while turns and turns[-1].get('role') in USER:
            question.insert(0, text_of(turns.pop()))
    except Fault as error:
        raise HTTPException(400, str(error)) from error
    # an answer to the model's own words was never in its rows
    if turns and not question:
        raise HTTPException(400, 'the last message must have the role user')
    # headers tell what the model sees otherwise, or not at all
    context = [text for text in [asked.system, *system] if text.strip()]
    if context:
        headers['X-System-In-Input'] = str(len(context))
    if turns:
        headers['X-Messages-Left-Out'] = str(len(turns))
    if asked.input:
        context.append(asked.input)
    row = {'instruction': '\n\n'.join(question), 'input': '\n\n'.join(context)}
    if not row['instruction'].strip():
        raise HTTPException(400, 'there is no instruction')
    ids = encode_prompt(row)
    check_room(ids, asked)
    masked_row = {name: mask(text, masked) for name, text in row.items()}
    return ids if masked_row == row else encode_prompt(masked_row)


def check_room(ids, asked):
    """
    HTTPException: a prompt leaves no room. It is asked before the text is masked, which takes a long one so
    much time that the answers of others would stand still.
    """
    try:
        check_prompt(served[asked.model].model.config, ids)
    except ModelError as error:
        raise HTTPException(400, str(error)) from error


def raw_prompt(prompt, asked, masked):
    """The ids of a text, or ids, that are to be continued. HTTPException: there is nothing in it."""
    ids = get_tokenizer().encode_ordinary(prompt) if isinstance(prompt, str) else prompt
    if not all(0 <= id < VOCAB_SIZE for id in ids):
        raise HTTPException(400, f'the ids of a prompt must be from 0 to {VOCAB_SIZE - 1}')
    text = detokenize(ids)
    if not text.strip():
        raise HTTPException(400, 'there is no instruction: the prompt is empty')
    check_room(ids, asked)
    # ids that were sent stay as they are, since the text's own may be others
    masked_text = mask(text, masked)
    return ids if masked_text == text else get_tokenizer().encode_ordinary(masked_text)


def read_prompts(asked, is_raw, headers):
    """The prompts of a request, as lists of ids. headers tell which kinds of text were masked."""
    masked = set()
    if asked.images:
        raise HTTPException(400, 'this model sees no images')
    if is_raw:
        # a text, ids, or a list of either
        prompts = asked.prompt
        if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
            prompts = [prompts]
        prompts = [raw_prompt(prompt, asked, masked) for prompt in prompts]
    else:
        prompts = [template_prompt(asked, headers, masked)]
    if masked:
        headers['X-Masked'] = ', '.join(sorted(masked))
    return prompts


def enqueue(asked, prompts, is_raw):
    """Let the answers to the prompts wait for the engine: a list of them. HTTPException: why not."""
    engine = served[asked.model]
    n_answers = len(prompts) * asked.n
    if n_answers > queue:
        raise HTTPException(400, f'{n_answers} answers are more than this server lets wait: {queue}')
    its_changed = asyncio.Event()
    try:
        answers = [Answer(engine.model.config, asked, prompts[i // asked.n], is_raw, i, its_changed)
                   for i in range(n_answers)]
    except ModelError as error:
        raise HTTPException(400, str(error)) from error
    # this may be another time; what can never be was refused above
    if n_waiting() + n_answers > queue:
        raise HTTPException(503, 'too many requests are waiting', {'Retry-After': '1'})
    for answer in answers:
        if answer.wants_none and not answer.scores_prompt:
            answer.ended = 'length'
            # of a prompt of one token that is to be scored there is nothing to compute
            if answer.echo and answer.n_top >= 0:
                answer.tokens = [(len(answer.echo), record) for record in answer.prompt_tokens]
        else:
            engine.add(answer)
    engine.changed.set()
    return answers


def end(answers, why):
    for answer in answers:
        answer.ended = answer.ended or why


async def watch(answers):
    """Yields when some of the answers may have grown, and twice a second, until all have ended."""
    its_changed = answers[0].changed
    while True:
        # asked before, since the last of a text may come while an earlier piece is sent
        have_ended = all(answer.ended for answer in answers)
        yield
        if have_ended:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await its_changed.wait()
        its_changed.clear()
        if time.monotonic() > answers[0].began + request_timeout:
            end(answers, 'length')  # some may still wait for room


async def stream_pieces(answers):
    """Yields the Pieces of the answers as they come, at the end of each an empty one that is its last."""
    left = list(answers)
    try:
        async for _ in watch(answers):
            for answer in list(left):
                has_ended = answer.ended
                piece = answer.take()
                is_empty = not piece or not (piece.text or piece.tokens)
                if not is_empty:
                    yield piece
                # the last piece has no text, since some clients drop it
                if has_ended:
                    left.remove(answer)
                    yield Piece(answer, '', None, is_empty and piece.is_first, True)
    finally:
        end(answers, 'cancelled')  # where the client has gone


async def check_access(request: Request):
    """HTTPException: the key is wrong, or without one a page of another origin asks."""
    headers = request.headers
    # the page itself needs no key: it asks for it
    key = os.environ.get('SERVE_API_KEY')
    if key:
        scheme, _, sent = headers.get('authorization', '').partition(' ')
        has_key = scheme.lower() == 'bearer' and secrets.compare_digest(sent.encode(), key.encode())
        if not has_key and request.scope['path'] not in ('/', '/health'):
            raise HTTPException(401, 'the API key is missing or wrong', {'WWW-Authenticate': 'Bearer'})
        return
    host = headers.get('host', '').lower()
    if not without_key and re.sub(r'\.?(:[0-9]+)?$', '', host) not in LOOPBACK:
        # against DNS rebinding
        raise HTTPException(403, 'a host other than localhost needs an API key')
    # a browser says where a page is from. Behind a proxy our own page seems to be foreign, too, but no other
    # page may send this header
    origin = headers.get('origin')
    is_foreign = bool(origin) and origin.partition('://')[2].lower() != host
    if is_foreign and request.method == 'POST' and 'x-requested-with' not in headers:
        raise HTTPException(403, 'pages of another origin are not allowed')


app = FastAPI(openapi_url=None, dependencies=[Depends(check_access)])
READ = ['GET', 'HEAD']


def is_ollama(request):
    return request.scope['path'].startswith('/api/')


def error_body(in_ollama, status, message):
    if in_ollama:
        return {'error': message}
    kind = 'invalid_request_error' if status < 500 else 'server_error'
    return {'error': {'message': message, 'type': kind, 'param': None, 'code': status}}


@app.exception_handler(HTTPException)
async def on_error(request, error):
    body = error_body(is_ollama(request), error.status_code, error.detail)
    return JSONResponse(body, error.status_code, error.headers)


@app.post('/v1/completions')
@app.post('/v1/chat/completions')
@app.post('/api/generate')
@app.post('/api/chat')
async def generate(request: Request):
    headers = {}
    asked = await parse_request(request, headers)
    is_chat = 'chat' in request.scope['path']
    dialect = OpenAIReply
    is_raw = not is_chat
    if is_ollama(request):
        dialect = OllamaReply
        is_raw = is_raw and asked.raw
        if asked.stream is None:
            asked.stream = True
        if not asked.messages and not asked.prompt:  # so its clients load a model
            return {'model': asked.model, 'created_at': now(), 'response': '', 'done': True,
                    'done_reason': 'load', 'message': {'role': 'assistant', 'content': ''}}
    # from here on the engine computes
    answers = enqueue(asked, read_prompts(asked, is_raw, headers), is_raw)
    reply = dialect(asked, answers, is_chat)
    if asked.stream:
        return StreamingResponse(reply.lines(), media_type=reply.media_type, headers=headers)
    # an answer that nobody waits for is not computed to its end
    async for _ in watch(answers):
        if await request.is_disconnected():
            end(answers, 'cancelled')
    for answer in answers:
        if answer.error:
            raise HTTPException(500, answer.error)
    pieces = [answer.take()._replace(is_last=True) for answer in answers]
    return JSONResponse(reply.whole(pieces), headers=headers)


class Reply(NamedTuple):
    """The answers to a request, which a dialect writes whole or as the lines of a stream."""
    asked: GenerateRequest
    answers: list
    is_chat: bool


# -----------------------------------------------------------------------------
# OpenAI's dialect

class OpenAIReply(Reply):
    media_type = 'text/event-stream'

    def head(self, ending=''):
        kind = 'chat.completion' + ending if self.is_chat else 'text_completion'
        return {'id': f'cmpl-{secrets.token_hex(12)}', 'object': kind, 'created': int(time.time()),
                'model': self.asked.model}

    def usage(self):
        n_read = sum(answer.n_prompt for answer in self.answers) // self.asked.n
        n_written = sum(answer.n_new for answer in self.answers)
        return {'prompt_tokens': n_read, 'completion_tokens': n_written, 'total_tokens': n_read + n_written}

    def logprobs(self, piece):
        if not piece.tokens:
            return None
        if self.is_chat:
            return {'content': piece.tokens}
        offsets = []
        likeliest = []
        for token in piece.tokens:
            # offsets count whole characters, of which a token may be a part
            offsets.append(len(piece.answer.bytes_sent.decode(errors='ignore')))
            piece.answer.bytes_sent += bytes(token['bytes'])
            # the token itself is always among them, if these are asked for
            tops = [token] + token['top_logprobs'] if piece.answer.n_top else []
            likeliest.append({top['token']: top['logprob'] for top in tops})
        logprobs = [token['logprob'] for token in piece.tokens]
        if logprobs[0] is None:
            likeliest[0] = None  # nothing stands before the first token of a prompt
        return {'tokens': [token['token'] for token in piece.tokens], 'token_logprobs': logprobs,
                'top_logprobs': likeliest, 'text_offset': offsets}

    def choice(self, piece, name):
        content = {'text': piece.text}
        if self.is_chat:
            role = {'role': 'assistant'} if piece.is_first else {}
            content = {name: role | {'content': piece.text}}
        return {'index': piece.answer.index, **content, 'logprobs': self.logprobs(piece),
                'finish_reason': piece.answer.ended if piece.is_last else None}

    def whole(self, pieces):
        choices = [self.choice(piece, 'message') for piece in pieces]
        return self.head() | {'choices': choices, 'usage': self.usage()}

    async def lines(self):
        head = self.head('.chunk')
        async for piece in stream_pieces(self.answers):
            yield event(head | {'choices': [self.choice(piece, 'delta')]})
        for answer in self.answers:
            if answer.error:
                yield event(error_body(False, 500, answer.error))
        if self.asked.stream_options.get('include_usage'):
            yield event(head | {'choices': [], 'usage': self.usage()})
        yield 'data: [DONE]\n\n'


def event(body):
    return f'data: {json.dumps(body)}\n\n'


@app.api_route('/v1/models/{name}', methods=READ)
async def model_json(name: str):
    name = find_model(name)
    return {'id': name, 'object': 'model', 'created': STARTED, 'owned_by': 'gpt2-sft',
            'examples': served[name].examples}


@app.api_route('/v1/models', methods=READ)
async def models_json():
    return {'object': 'list', 'data': [await model_json(name) for name in served]}


# -----------------------------------------------------------------------------
# Ollama's dialect

def now():
    return datetime.now(UTC).isoformat()


class OllamaReply(Reply):
    media_type = 'application/x-ndjson'

    def part(self, piece):
        answer = piece.answer
        content = {'response': piece.text}
        if self.is_chat:
            content = {'message': {'role': 'assistant', 'content': piece.text}}
        part = {'model': self.asked.model, 'created_at': now(), **content, 'done': piece.is_last}
        if piece.tokens:
            part['logprobs'] = piece.tokens
        if piece.is_last:
            # times in ns, as Ollama tells them
            ended = time.monotonic()
            read = answer.first_token or ended
            part |= {'done_reason': answer.ended, 'total_duration': int(1e9 * (ended - answer.began)),
                     'load_duration': 0, 'prompt_eval_count': answer.n_prompt,
                     'prompt_eval_duration': int(1e9 * (read - answer.began)),
                     'eval_count': answer.n_new, 'eval_duration': int(1e9 * (ended - read))}
        return part

    def whole(self, pieces):
        return self.part(pieces[0])

    async def lines(self):
        async for piece in stream_pieces(self.answers):
            body = self.part(piece)
            if piece.is_last and piece.answer.error:
                body = error_body(True, 500, piece.answer.error)
            yield json.dumps(body) + '\n'


@app.api_route('/api/version', methods=READ)
async def version():
    return {'version': '0.1.0'}


@app.api_route('/api/tags', methods=READ)
@app.api_route('/api/ps', methods=READ)
async def tags():
    """All models are loaded, and stay so."""
    more = {'expires_at': '2100-01-01T00:00:00Z', 'size_vram': 0}
    return {'models': [engine.about | more for engine in served.values()]}


@app.post('/api/show')
async def show(request: Request):
    asked = await parse_request(request, {})
    return served[asked.model].about


# -----------------------------------------------------------------------------
# the page, and what operators look at

@app.api_route('/', methods=READ)  # Ollama's command asks by HEAD whether a server runs
async def page():
    # the page runs its own script alone, whatever text a model writes into it
    nonce = secrets.token_urlsafe(16)
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    text = Path(__file__).with_name('web').joinpath('chat.html').read_text(encoding='utf-8')
    return HTMLResponse(text.replace('NONCE', nonce), headers={'Content-Security-Policy': policy})


@app.api_route('/health', methods=READ)
async def health():
    return {'status': 'ok'}


@app.api_route('/metrics', methods=READ)
async def metrics():
    return PlainTextResponse(generate_latest())


# -----------------------------------------------------------------------------
# start

STARTED = int(time.time())


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection on which a request's head does not come in time: uvicorn waits."""
    head_timer = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.time_head()

    def data_received(self, data):
        super().data_received(data)
        self.time_head()

    def time_head(self):
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and not self.head_timer:
            self.head_timer = self.loop.call_later(READ_SECONDS, self.transport.close)
        elif self.head_timer and not is_waiting:
            self.head_timer.cancel()
            self.head_timer = None


def check_settings():
    """Read the user's patterns. UserError: the filters or the address are not as they must be."""
    if not set(chain) <= FINDERS.keys() or ('patterns' in chain) != bool(patterns):
        raise UserError(f'filters={filters!r} may name pii, profanity, and patterns with a file, like '
                        '--patterns=mine.txt')
    # some editors begin a file with a byte order mark
    try:
        lines = Path(patterns).read_text(encoding='utf-8-sig').splitlines() if patterns else []
        FINDERS['patterns'] = [('masked', re.compile(line), whole_size) for line in lines if line.strip()]
    except (OSError, ValueError, re.error) as error:
        raise UserError(f'cannot use patterns={patterns!r}: {error}') from error
    if not (host in (*LOOPBACK, '::1') or os.environ.get('SERVE_API_KEY') or without_key):
        raise UserError(f'{host} may be reached from outside: set SERVE_API_KEY in the environment, or, to '
                        'let anyone ask, --without_key=True')


def listen():
    """A socket that listens. UserError: the address cannot be used."""
    try:
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        # or a reply of two packets waits 40 ms for the client's acknowledgement; accepted sockets inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, OverflowError) as error:
        raise UserError(f'cannot listen on {host}, port {port}: {error}; set --host or --port') from error
    return listener


def page_examples(about):
    """Up to six rows of a run's own test split, of as many families as there are; [] if it is not here."""
    try:
        meta = read_split(about['config']['dataset'], 'test', 1000).meta
    except (UserError, LookupError):
        return []
    rows = meta['rows'] if meta['sha256'] == about['sha256'] else []
    return [{'title': family, 'instruction': row['instruction'], 'input': row.get('input') or ''}
            for family, row in find_examples(rows).items()][:6]


def describe(name, loaded, dtype):
    """A model as Ollama's dialect lists it."""
    n_params = sum(p.numel() for p in loaded.model.parameters())
    kinds = {torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16'}
    return {
        'name': name, 'model': name, 'modified_at': now(), 'size': n_params * dtype.itemsize,
        'digest': loaded.made_of['weights'],
        'details': {'family': 'gpt2', 'parameter_size': f'{n_params / 1e6:.0f}M',
                    'quantization_level': kinds[dtype]},
        'model_info': {'general.architecture': 'gpt2', 'gpt2.context_length': loaded.model.config.block_size},
        'template': BEFORE_INSTRUCTION + '{{ .Prompt }}' + RESPONSE_HEADER, 'capabilities': ['completion']}


def load_models():
    """Fill served: with the run's model and the one it came from, or with the one that init_from names."""
    chosen_device, compute_dtype = choose_device(device, dtype)
    run = find_run(config)
    examples = []
    if run:
        examples = page_examples(read_json(run))
        loaded = {run.stem: load_run(run)}
        if before:
            name = run.stem.removesuffix('-sft') + '-before'
            loaded[name] = load_base(run, cache_dir, download_from)
    else:
        model = load_named(init_from, cache_dir, download_from)
        loaded = {model.model.config.name: model}
    # described before their matrices move into other layers
    for name, model in loaded.items():
        about = describe(name, model, compute_dtype)
        for_inference(model.model, chosen_device, compute_dtype)
        served[name] = ServingEngine(model.model, 1e9 * cache_gb / len(loaded), about, examples)


async def serve(server, listener):
    """Serve and compute. SIGTERM and Ctrl-C: no new connections, those who wait are answered, exit code 0."""
    # if the task of an engine dies, the server ends, too
    async with asyncio.TaskGroup() as tasks:
        computing = [tasks.create_task(compute(engine)) for engine in served.values()]
        await server.serve(sockets=[listener])
        for task in computing:
            task.cancel()


def main():
    check_settings()
    # an address that is taken is told before models are loaded
    listener = listen()
    thread.submit(load_models).result()
    server = uvicorn.Server(uvicorn.Config(
        app, http=TimedProtocol, ws='none', log_level='warning', access_log=False, lifespan='off',
        timeout_graceful_shutdown=request_timeout))

    def stop(number, frame):
        server.should_exit = True

    # uvicorn's own handlers take their place while it serves, and raise the signals again at its end
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)
    name = f'[{host}]' if ':' in host else host
    print(f'{", ".join(served)}: http://{name}:{listener.getsockname()[1]}', flush=True)
    asyncio.run(serve(server, listener))


if __name__ == '__main__':
    main()
