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
import codecs
import json
import os
import re
import secrets
import signal
import socket
import time
import traceback
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from config import UserError, configure, read_json
from engine import Engine, KVCache, Sequence, choose_device, for_inference, return_freed_memory
from model import ModelError
from prepare import (
    BEFORE_INSTRUCTION,
    RESPONSE_HEADER,
    SYSTEM,
    USER,
    Fault,
    detokenize,
    encode_prompt,
    get_tokenizer,
    prefix_ids,
    read_split,
    text_of,
)
from sample import find_run, load_base, load_named, load_run, response_text

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from pydantic import AliasChoices, BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from stdnum import iban, luhn
from uvicorn.protocols.http.h11_impl import H11Protocol

# oneDNN and torch would each keep 1,024 products, one for each number of rows: 100 MB in a long run
for cache in 'LRU_CACHE_CAPACITY', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY':
    os.environ.setdefault(cache, '64')

# -----------------------------------------------------------------------------
# model
out_dir = 'out'  # the run: its <model>-sft.pth answers
init_from = 'gpt2-medium'  # where there is no run, or as a flag that names another model: what answers
before = True  # serve the model before fine-tuning, too
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
request_timeout = 120.0  # seconds; what there is then is the answer [> 0]
# filters
filters = 'pii,profanity'  # pii, profanity, patterns, several with commas; empty: none
patterns = ''  # the file of 'patterns': a regular expression a line
# device
device = 'auto'  # [auto | cpu | cuda | mps]
dtype = 'auto'  # auto: the GPU's best on cuda, else float32 [auto | float32 | bfloat16 | float16]
# -----------------------------------------------------------------------------
config = configure(globals())

PREFILL_SIZE = 256  # ids of prompts in a step, beside those of the answers that are under way
READ_SECONDS = 20  # in which a request's head must come, and its body
IDLE_SECONDS = 5  # without work, after which the caches are given back
LOOPBACK = '127.0.0.1', 'localhost', '[::1]'

# -----------------------------------------------------------------------------
# filters: each finds by evidence, check digits, lengths or a word that stands near, not by looks alone

SPACE = '[ \u00a0\u202f]'  # two of them do not break a line
EMAIL = re.compile(r'''[^\s@"'()<>,;:\[\]]{1,64}(?:@|[\[(]at[\])])[^\s@"'()<>,;:/\[\]]{1,63}'''
                   r'(?:\.|[\[(]dot[\])])[^\W\d_]{2,24}\b')
IBAN = re.compile(rf'(?<![A-Za-z0-9])[A-Za-z]{{2}}[0-9]{{2}}(?:(?:{SPACE}|-)?[A-Za-z0-9]){{11,30}}')
CARD = re.compile(rf'(?<!\w)(?<![0-9][.,])[0-9]{{4}}(?:(?:{SPACE}|[.-])?[0-9]){{9,18}}')
BRAND = re.compile('4.{12}|4.{15}|3[47].{13}|3[0689].{12}|(?:2[2-7]|35|5.|6.).{14}')  # without rare lengths
# numbers that a clear form tells: +49 30 1234567, (555) 123-4567, 020 7946 0123, 555-123-4567
PHONE = re.compile(rf'''(?<![\w.(+/-])(?:
    (?:\+|(?<![0-9]\ )00)[1-9](?:(?:{SPACE}|[./-]){{0,2}}\(?[0-9]\)?){{7,14}}
    | \([2-9][0-9]{{2}}\){SPACE}?[0-9]{{3}}[ .-]?[0-9]{{4}}
    | \(0[0-9]{{1,5}}\)[ ./-]?[0-9]{{2,8}}(?:[ .-][0-9]{{2,8}}){{0,3}}
    | (?<![0-9]\ )0[1-9][0-9]{{0,4}}(?:(?:{SPACE}|[./-])[0-9]{{2,8}}){{1,4}}(?!\ [0-9]{{1,2}}\b)
    | (?:1[ .-])?[2-9][0-9]{{2}}([.-])[0-9]{{3}}\1[0-9]{{4}}
    )(?![\w]|[./-][0-9])''', re.VERBOSE)
# numbers that only a word before them tells from any other
BARE_PHONE = re.compile(rf'(?<![\w.(+/-])\(?[0-9](?:(?:{SPACE}|[./-])?[()]?[0-9]){{6,13}}(?![\w]|[./-][0-9])')
PHONE_WORD = re.compile(
    r'(?:\b(?:call|dial|ring|phone|telephone|tel|mobile|landline|fax|sms|whatsapp|hotline|helpline|voicemail'
    r'|(?:text|reach) (?:me|us|him|her)|my (?:number|cell)|pick up|telefon|handy|rufnummer|ruf|anruf'
    r'|téléphone|mon portable|appel|joindre|teléfono|móvil|llam|llám)\w*|☎)[^!?\n]{0,30}$', re.IGNORECASE)
NO_PHONE = re.compile('|'.join([
    r'(?<![0-9.])[0-9]{1,2}([./-])[0-9]{1,2}\1(?:[0-9]{4}|[0-9]{2})(?!\1?[0-9])',  # 17.05.2024, 5/17/24
    r'[0-9]{4}([./-])[0-9]{2}\2[0-9]{2}',  # 2024-05-17
    r'[0-9]{1,2}\.[0-9]{2}-[0-9]{1,2}\.[0-9]{2}',  # 08.30-17.00
    r'\b(?:19|20)[0-9]{2}[/-](?:19|20)[0-9]{2}\b',  # 1990-2000
    r'\b[1-9][0-9]*0-[1-9][0-9]*00\b']))  # 500-1000
THOUSANDS = re.compile(r'\+?[0-9]{1,3}(?:[ .\u00a0\u202f][0-9]{3})+')
WORD = re.compile(r'(?<!\w)\w(?:[\w@$!]{0,40}\w)?')
LEET = str.maketrans('01345@$!', 'oieasasi')
MEASURE = re.compile('[0-9]+[a-z]{1,2}')  # 45s is a time
RUDE = set((Path(__file__).parent / 'data/rude_words.txt').read_text(encoding='utf-8').splitlines())


def cuts(match):
    """The sizes at which what was found may end: behind each letter or digit that no further one follows."""
    text = match.string[match.start():match.end() + 1]
    sizes = [end.end() for end in re.finditer('[A-Za-z0-9](?![A-Za-z0-9])', text)]
    return [size for size in sizes if size <= len(match[0])]


def iban_size(match):
    """How many characters of a match are an IBAN: words may follow it. 0: none."""
    for size in cuts(match):
        number = re.sub('[^A-Za-z0-9]', '', match[0][:size]).upper()
        if len(number) >= 15 and iban.is_valid(number, check_country=False):
            return size
    return 0


def card_size(match):
    """How many characters of a match are a card's number: a date or a CVV may follow it."""
    for size in cuts(match):
        groups = re.findall('[0-9]+', match[0][:size])
        digits = ''.join(groups)
        is_grouped = min([4] + [len(group) for group in groups[:-1]]) >= 4
        if is_grouped and BRAND.fullmatch(digits) and luhn.is_valid(digits):
            return size
    return 0


def phone_size(match):
    n_digits = sum(map(str.isdigit, match[0]))
    fewest = 7
    if match[0].startswith('0'):
        fewest = 12 if match[0].startswith('00') else 10
    elif match[0].startswith('+') or match[0].isdigit() or THOUSANDS.fullmatch(match[0]):
        fewest = 9
    is_phone = fewest <= n_digits <= 15 and not NO_PHONE.search(match[0])
    return len(match[0]) if is_phone else 0


def bare_phone_size(match):
    is_told = PHONE_WORD.search(match.string[max(0, match.start() - 60):match.start()])
    return phone_size(match) if is_told else 0


def rude_size(match):
    word = match[0].lower()
    is_number = word.isdigit() or MEASURE.fullmatch(word)
    return len(word) if not is_number and word.translate(LEET) in RUDE else 0


def whole_size(match):
    return len(match[0])


FINDERS = {  # filter: (kind, pattern, how many characters of a match are of this kind)
    'pii': [('email', EMAIL, whole_size), ('IBAN', IBAN, iban_size), ('card', CARD, card_size),
            ('phone', PHONE, phone_size), ('phone', BARE_PHONE, bare_phone_size)],
    'profanity': [('offensive', WORD, rude_size)],
    'patterns': [],  # the user's, read at the start
}
chain = [name.strip() for name in filters.split(',') if name.strip()]


def replace(kind, pattern, size_of, text):
    """The text with [kind] in place of what is found; the search goes on within a match that is none."""
    parts = []
    end = 0
    match = pattern.search(text)
    while match:
        size = size_of(match)
        if size:
            parts += [text[end:match.start()], f'[{kind}]']
            end = match.start() + size
        match = pattern.search(text, max(end, match.start() + 1))
    return ''.join(parts) + text[end:]


def mask(text, found=None):
    """The text with [kind] in place of what the filters find. found: a set that gets these kinds."""
    for name in chain:
        for kind, pattern, size_of in FINDERS[name]:
            masked = replace(kind, pattern, size_of, text)
            if found is not None and masked != text:
                found.add(kind)
            text = masked
    return text


NUMBERS = '0123456789()+./- \u00a0\u202f'  # what a number may hold
IBAN_BEGUN = re.compile(rf'(?<![A-Za-z0-9])[A-Za-z]{{2}}[0-9]{{2}}(?:(?:{SPACE}|-)?[A-Za-z0-9]){{0,29}}$')


def final_size(text):
    """How many characters of an unfinished text are final: no match can reach over their end."""
    if 'patterns' in chain or RESPONSE_HEADER.strip().startswith(text):
        return 0  # patterns may need all of it; and a header is no part of an answer
    if not chain:
        return len(text.rstrip('\ufffd'))  # a character may be of several tokens
    # the white space before the last word, which is unfinished; not within a number or an IBAN
    last = last_space(text.rstrip())
    if text[last + 1:last + 2] in NUMBERS:
        last = last_space(text[:len(text[:last].rstrip(NUMBERS)) + 1])
    begun = IBAN_BEGUN.search(text[:last], max(0, last - 70))
    return last_space(text[:begun.start()]) if begun else last


def last_space(text):
    """Where the last white space of a text is; 0: there is none."""
    return max(re.match(r'(?s:.*)\s|', text).end() - 1, 0)


# -----------------------------------------------------------------------------
# the engine's thread: answers, and the steps that compute them

served = {}  # name: Served
answers_of_all = weakref.WeakSet()  # as long as a request or an engine holds them
changed = asyncio.Event()  # set when there is something to compute
# all of torch runs in this thread: with a second pool of OpenMP threads each step would take a third longer
thread = ThreadPoolExecutor(1)

Gauge('active_rows', 'answers that are being computed').set_function(lambda: sum(
    len(model.engine.scheduler.running) for model in served.values()))
Gauge('waiting_rows', 'answers that wait for room').set_function(lambda: n_waiting())
Gauge('cache_bytes', 'keys and values').set_function(lambda: sum(
    layer.nbytes for model in served.values() for layer in model.engine.cache.layers))
new_tokens = Counter('new_tokens', 'generated')
first_token_seconds = Histogram('first_token_seconds', 'from a request to the first token of an answer')


class Served(NamedTuple):
    engine: 'ServingEngine'
    about: dict  # as Ollama's dialect lists it
    examples: list  # rows that the page offers


def n_waiting():
    return sum(len(model.engine.arrived) + len(model.engine.scheduler.waiting) for model in served.values())


class Answer(Sequence):
    """
    One answer. Sequence's fields change in the engine's thread while a step is computed; requests read the
    others, which on_token sets between two steps.
    """

    def __init__(self, config, asked, prompt, number, changed):
        limit = max_new_tokens if asked.max_tokens < 0 else min(asked.max_tokens, max_new_tokens)
        seed = asked.seed + number
        super().__init__(config, prompt.ids, max(limit, 1), asked.temperature, asked.top_k, seed)
        self.is_raw = prompt.is_raw
        self.stop = asked.stop
        self.n_top = asked.n_top
        self.echo = prompt.text if asked.echo and prompt.is_raw else ''
        self.scores_prompt = bool(self.echo) and asked.n_top >= 0
        self.wants_none = limit == 0  # no new ids: the prompt alone
        self.prompt_tokens = [token_record(prompt.ids[0], None)]  # the prompt's records, if it is scored
        self.changed = changed
        self.began = time.monotonic()
        self.first_token = 0.0
        self.text = ''
        self.tokens = []  # (length of the text with it, its record) of each new id
        self.n_new = 0
        self.taken = ''  # the text that was sent, and of how many tokens
        self.n_taken = 0
        self.has_begun = False  # to be sent
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')  # tells where a token's text begins
        self.offset = 0
        self.ended = ''  # why: stop, length, error or cancelled
        self.error = ''

    def fail(self, error):
        if not self.ended:
            self.error = str(error).partition('\n')[0] or type(error).__name__
            self.ended = 'error'
            self.changed.set()

    def on_token(self, record):
        """Take over the id of a step, and its record. A stop sequence ends the answer before it."""
        if self.ended:  # while the step was computed
            return
        new_tokens.inc()
        if not self.first_token:
            self.first_token = time.monotonic()
            first_token_seconds.observe(self.first_token - self.began)
        self.ended = 'length' if self.wants_none else self.finish_reason
        if not self.wants_none:
            self.read_text(record)
        if time.monotonic() - self.began > request_timeout:
            self.ended = self.ended or 'length'
        self.changed.set()

    def read_text(self, record):
        new_ids = self.new_ids
        self.n_new = len(new_ids)
        self.text = detokenize(new_ids) if self.is_raw else response_text(new_ids)
        # a header that the model repeats is dropped once it is whole, and the text gets shorter
        self.tokens = [(min(end, len(self.text)), earlier) for end, earlier in self.tokens]
        if record and (self.is_raw or self.finish_reason != 'stop'):
            self.tokens.append((len(self.text), record))
        places = [self.text.index(stop) for stop in self.stop if stop in self.text]
        if places:
            self.text = self.text[:min(places)]
            self.ended = 'stop'

    def take(self):
        """The Piece that is final since the last call, or None; its tokens are None where a filter masked."""
        if not self.first_token and not self.ended:
            return None
        size = len(self.text)
        if not self.ended:
            before_stop = size + 1 - max([len(stop) for stop in self.stop], default=1)
            size = final_size(self.text[:max(before_stop, 0)])
        masked = mask(self.text[:size])
        text = masked[len(self.taken):]
        tokens = [record for end, record in self.tokens if end <= size][self.n_taken:]
        self.taken = masked
        if not self.has_begun:
            text = self.echo + text
        if not text and not self.ended:
            return None
        self.n_taken += len(tokens)
        if self.echo and not self.has_begun:
            tokens = self.prompt_tokens + tokens
        is_shown = self.n_top >= 0 and masked == self.text[:size]
        piece = Piece(self, text, tokens if is_shown else None, not self.has_begun, False)
        self.has_begun = True
        return piece


class Piece(NamedTuple):
    answer: Answer
    text: str
    tokens: list | None  # their records
    is_first: bool
    is_last: bool


def token_record(id, logprob):
    """An id and its log-probability as OpenAI's chats write them."""
    data = get_tokenizer().decode_single_token_bytes(id)
    logprob = logprob if logprob is None else max(logprob, -9999)
    return {'token': token_text(data), 'logprob': logprob, 'bytes': list(data), 'top_logprobs': []}


def token_text(data, prefix=''):
    """The text of a token; of a part of a character its bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + ''.join(f'\\x{byte:02x}' for byte in data)


def score(ids, logits, n_top):
    """Records of ids by their logits (n, vocab), each with the n_top likeliest that no filter masks."""
    logprobs = logits.float().log_softmax(dim=1)
    likeliest = logprobs.topk(n_top)
    records = []
    for i, id in enumerate(ids):
        record = token_record(id, logprobs[i, id].item())
        for other, logprob in zip(likeliest.indices[i].tolist(), likeliest.values[i].tolist()):
            alternative = token_record(other, logprob)
            del alternative['top_logprobs']
            if mask(alternative['token']) == alternative['token']:
                record['top_logprobs'].append(alternative)
        records.append(record)
    return records


class ServingEngine(Engine):
    """
    An Engine whose failures end the answers at fault alone, and which records the log-probabilities of
    prompts. Requests only append to arrived; all else happens in the engine's thread.
    """

    def __init__(self, model, cache_bytes):
        model.h[-1].register_forward_hook(self.keep_hidden)
        prefix = prefix_ids()[:model.config.block_size - 1]
        super().__init__(model, prefix, cache_bytes, max_active, max_active + PREFILL_SIZE)
        self.prefix_hidden = self.hidden
        self.arrived = deque()

    def keep_hidden(self, block, inputs, output):
        self.hidden = output[0]  # (N, C), what the last block returned for the positions of a step

    def has_work(self):
        return bool(self.arrived) or super().has_work()

    def compute(self, batch):
        starts = [answer.n_cached for answer, _ in batch]
        logits = super().compute(batch)
        end = 0
        for (answer, n_ids), start in zip(batch, starts):
            end += n_ids
            if answer.scores_prompt:
                self.score_prompt(answer, start, self.hidden[end - n_ids:end])
        return logits

    def score_prompt(self, answer, start, hidden):
        """Record the log-probabilities of a piece of a prompt: each position tells those of the next id."""
        if start == len(self.scheduler.prefix) and len(answer.prompt_tokens) == 1:
            hidden = torch.cat([self.prefix_hidden, hidden])  # the engine did not compute the prefix again
            start = 0
        ids = answer.ids[start + 1:min(start + len(hidden) + 1, answer.n_prompt)]
        if ids:
            answer.prompt_tokens += score(ids, self.model.logits(hidden[:len(ids)]), answer.n_top)
        answer.scores_prompt = len(answer.prompt_tokens) < answer.n_prompt

    def step_safely(self):
        """
        Let the arrived in and the ended out, and compute a step: [(answer, the record of its new id)]. The
        record is None where nobody asked for it, an exception where the answer failed.
        """
        while self.arrived:
            self.add(self.arrived.popleft())
        for answer in [*self.scheduler.running, *self.scheduler.waiting]:
            if answer.ended:
                self.remove(answer)
        try:
            answers, logits = self.step()
        except Exception:
            traceback.print_exc()
            return self.step_one_by_one()
        return self.record(answers, logits)

    @torch.no_grad()
    def record(self, answers, logits):
        found = []
        for i, answer in enumerate(answers):
            records = [None]
            if answer.n_top >= 0:
                records = score(answer.ids[-1:], logits[i:i + 1], answer.n_top)
            found.append((answer, records[0]))
        return found

    def step_one_by_one(self):
        """
        After a step that failed: let each answer that ran compute an id alone; those that cannot have failed.
        The others begin again with all their ids, which takes a moment and changes nothing.
        """
        running = self.scheduler.running[:]
        waiting = list(self.scheduler.waiting)
        found = []
        failed = []
        for answer in running:
            self.clear()
            self.add(answer)
            if answer.scores_prompt:
                del answer.prompt_tokens[1:]
            answers = []
            try:
                while not answers:
                    answers, logits = self.step()
                found += self.record(answers, logits)
            except Exception as error:
                failed.append((answer, error))
        self.clear()
        if not failed:
            self.scheduler.max_running = max(1, len(running) // 2)  # together they were too many
        for answer in [answer for answer, _ in found if not answer.finish_reason] + waiting:
            self.add(answer)
        return found + failed

    def clear(self):
        """Forget all sequences, and their keys and values."""
        self.cache = KVCache(self.model.config, self.device, self.cache.layers[0].dtype)
        for answer in self.scheduler.running:
            answer.n_cached = 0
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()

    def rest(self):
        """Give the memory of the cache back."""
        self.clear()
        self.scheduler.max_running = max_active
        return_freed_memory()


async def compute():
    """The task that computes: a step of each engine in turn, in the thread; requests are read meanwhile."""
    while True:
        for engine in [model.engine for model in served.values()]:
            if engine.has_work():
                await compute_step(engine)
        if any(model.engine.has_work() for model in served.values()):
            continue
        changed.clear()
        try:
            await asyncio.wait_for(changed.wait(), IDLE_SECONDS)
        except TimeoutError:
            for model in served.values():
                await run_in_thread(model.engine.rest)
            await changed.wait()


async def compute_step(engine):
    try:
        for answer, record in await run_in_thread(engine.step_safely):
            if isinstance(record, Exception):
                answer.fail(record)
            else:
                answer.on_token(record)
    except Exception as error:  # the server outlives any request
        traceback.print_exc()
        await run_in_thread(engine.clear)
        for answer in answers_of_all:
            answer.fail(error)
    await asyncio.sleep(0)  # requests look at it now: beside a step they would slow it down


def run_in_thread(function):
    return asyncio.wrap_future(thread.submit(function))


# -----------------------------------------------------------------------------
# a request

class GenerateRequest(BaseModel):
    """The fields of both dialects that are built; Ollama's options are taken as fields."""
    model: str = Field('', validation_alias=AliasChoices('model', 'name'))
    messages: list[dict[str, Any]] = []
    prompt: str | list[str] | list[int] | list[list[int]] = ''
    input: str = ''  # of the instruction; an extra of ours, as top_k is in OpenAI's dialect
    system: str = ''
    raw: bool = False
    echo: bool = False
    stream: bool | None = None
    stream_options: dict = {}
    n: int = Field(1, ge=1)
    max_tokens: int = Field(-1, validation_alias=AliasChoices(
        'max_tokens', 'max_completion_tokens', 'num_predict'))  # below 0: the server's limit
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


class Prompt(NamedTuple):
    ids: list
    text: str
    is_raw: bool  # continued as it is; else put into the template


FIELDS = {*GenerateRequest.model_fields, 'name', 'max_completion_tokens', 'num_predict', 'options'}
# settings that are not built: with these values, or without any, they would change nothing
NEUTRAL = {'top_p': 1, 'repeat_penalty': 1, 'typical_p': 1, 'best_of': 1, 'response_format': {'type': 'text'}}


def find_model(name):
    """The name by which a model is served; with Ollama's tag, too. HTTPException: there is none."""
    name = name.removesuffix(':latest') or next(iter(served))
    if name not in served:
        raise HTTPException(404, f'there is no model {name!r}; there are: {", ".join(served)}')
    return name


async def read_body(request):
    """The fields of a request's JSON. HTTPException: it is too large, too slow or wrong."""
    body = bytearray()
    try:
        async with asyncio.timeout(min(READ_SECONDS, request_timeout)):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_body:
                    raise HTTPException(413, f'a request may have {max_body:,} bytes')
        fields = dict(json.loads(body))
        fields |= dict(fields.get('options') or {})
    except TimeoutError:
        raise HTTPException(408, 'the request did not come in time', {'Connection': 'close'}) from None
    except (ValueError, TypeError, RecursionError, ClientDisconnect):
        raise HTTPException(400, 'the request is not a complete JSON object') from None
    return {key: value for key, value in fields.items() if value is not None}


async def parse_request(request, headers):
    """A request -> a GenerateRequest. headers: of the reply, in which is told what is not heeded."""
    fields = await read_body(request)
    known = FIELDS
    if request.scope['path'].startswith('/api/'):
        known = FIELDS - {'n', 'echo'}
    ignored = []
    for key in fields.keys() - known:
        if fields[key] and fields[key] != NEUTRAL.get(key):
            ignored.append(re.sub(r'[^\w.-]', '?', key, flags=re.ASCII)[:40])
    if ignored:
        headers['X-Ignored'] = ', '.join(sorted(ignored)[:20])
    try:
        asked = GenerateRequest(**{key: value for key, value in fields.items() if key in known})
    except ValidationError as error:
        fault = error.errors()[0]
        raise HTTPException(400, f'{".".join(map(str, fault["loc"]))}: {fault["msg"]}') from None
    asked.model = find_model(asked.model)
    asked.stop = [stop for stop in ([asked.stop] if isinstance(asked.stop, str) else asked.stop) if stop]
    asked.top_k = max(asked.top_k, 0)
    if asked.seed < 0:
        asked.seed = secrets.randbits(31)
    return asked


def template_prompt(asked, headers, masked):
    """
    The Prompt of a chat or of Ollama's generate. As prepare.py reads chats, system messages come before the
    input; of the turns the last question is what the model answers. HTTPException: there is none.
    """
    messages = asked.messages or [{'role': 'user', 'content': asked.prompt}]
    try:
        system = [text_of(message) for message in messages if message.get('role') in SYSTEM]
        turns = [message for message in messages if message.get('role') not in SYSTEM]
        question = []
        while turns and turns[-1].get('role') in USER:
            question.insert(0, text_of(turns.pop()))
    except Fault as error:
        raise HTTPException(400, str(error)) from error
    if turns and not question:
        raise HTTPException(400, 'the last message must have the role user')
    context = [text for text in [asked.system, *system] if text.strip()]
    if context:
        headers['X-System-In-Input'] = str(len(context))
    if turns:
        headers['X-Messages-Left-Out'] = str(len(turns))
    row = {'instruction': mask('\n\n'.join(question), masked),
           'input': mask('\n\n'.join(context + [asked.input] * bool(asked.input)), masked)}
    if not row['instruction'].strip():
        raise HTTPException(400, 'there is no instruction')
    return Prompt(encode_prompt(row), row['instruction'], False)


def raw_prompt(prompt, vocab_size, masked):
    """The Prompt of a text or of ids that are to be continued. HTTPException: there is nothing in it."""
    ids = prompt if isinstance(prompt, list) else []
    if not all(0 <= id < vocab_size for id in ids):
        raise HTTPException(400, f'the ids of a prompt are from 0 to {vocab_size - 1}')
    text = detokenize(ids) if ids else prompt or ''
    if not text.strip() and not ids:
        raise HTTPException(400, 'there is no instruction: the prompt is empty')
    masked_text = mask(text, masked)
    if not ids or masked_text != text:
        ids = get_tokenizer().encode_ordinary(masked_text)
    return Prompt(ids, detokenize(ids), True)


def read_prompts(asked, is_raw, headers):
    """The Prompts of a request. headers tell which kinds of text were masked."""
    masked = set()
    if is_raw:
        given = asked.prompt
        is_single = isinstance(given, str) or not given or isinstance(given[0], int)
        vocab_size = served[asked.model].engine.model.config.vocab_size
        prompts = [raw_prompt(prompt, vocab_size, masked) for prompt in ([given] if is_single else given)]
    else:
        prompts = [template_prompt(asked, headers, masked)]
    if masked:
        headers['X-Masked'] = ', '.join(sorted(masked))
    return prompts


def enqueue(asked, prompts):
    """Let the answers to the prompts wait for the engine: a list of them. HTTPException: why not."""
    engine = served[asked.model].engine
    n_answers = len(prompts) * asked.n
    if n_answers > queue:
        raise HTTPException(400, f'{n_answers} answers are more than this server can let wait: {queue}')
    its_changed = asyncio.Event()
    try:
        answers = [Answer(engine.model.config, asked, prompt, i, its_changed)
                   for prompt in prompts for i in range(asked.n)]
    except ModelError as error:
        raise HTTPException(400, str(error)) from error
    if n_waiting() + n_answers > queue:
        raise HTTPException(503, 'too many requests are waiting', {'Retry-After': '1'})
    for index, answer in enumerate(answers):
        answer.index = index
        if answer.wants_none and not answer.scores_prompt:
            answer.ended = 'length'
        else:
            engine.arrived.append(answer)
    answers_of_all.update(answers)
    changed.set()
    return answers


async def watch(answers):
    """
    Yields whenever some of the answers have grown, until all have ended. Closed before that, since the client
    has gone, it ends them.
    """
    its_changed = answers[0].changed
    try:
        while True:
            yield
            if all(answer.ended for answer in answers):
                return
            try:
                async with asyncio.timeout_at(answers[0].began + request_timeout):
                    await its_changed.wait()
            except TimeoutError:  # some may still wait for room
                for answer in answers:
                    answer.ended = answer.ended or 'length'
            its_changed.clear()
    finally:
        for answer in answers:
            answer.ended = answer.ended or 'cancelled'


async def stream_pieces(answers):
    """Yields the Pieces of the answers as they come, at the end of each an empty one that is its last."""
    left = list(answers)
    async for _ in watch(answers):
        for answer in list(left):
            piece = answer.take()
            if piece and (piece.text or piece.tokens):
                yield piece
            if answer.ended:
                left.remove(answer)
                yield Piece(answer, '', None, piece.is_first and not piece.text, True)


async def whole_pieces(request, answers):
    """The Pieces of the answers once all have ended; fewer if the client has gone before."""
    async def until_ended():
        async for _ in watch(answers):
            pass

    async def until_gone():
        while (await request.receive())['type'] != 'http.disconnect':
            pass

    ended = asyncio.create_task(until_ended())
    gone = asyncio.create_task(until_gone())
    try:
        await asyncio.wait([ended, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
        gone.cancel()
    return [answer.take()._replace(is_last=True) for answer in answers if answer.ended]


def check_access(request: Request):
    """HTTPException: the key is wrong, or a page of another origin asks."""
    key = os.environ.get('SERVE_API_KEY')
    headers = request.headers
    scheme, _, sent = headers.get('authorization', '').partition(' ')
    has_key = bool(key) and scheme.lower() == 'bearer' and secrets.compare_digest(sent.encode(), key.encode())
    name = re.sub(r':[0-9]+$', '', headers.get('host', ''))
    if not key and not without_key and name not in LOOPBACK:
        raise HTTPException(403, 'under a name other than localhost a key is needed')  # against DNS rebinding
    # a browser says where a page is from. Behind a proxy our own page seems to be foreign, too, but no other
    # page may send this header
    origin = headers.get('origin')
    is_foreign = bool(origin) and origin.partition('://')[2] != headers.get('host')
    if is_foreign and request.method == 'POST' and not has_key and 'x-requested-with' not in headers:
        raise HTTPException(403, 'pages of another origin may not ask')
    if key and not has_key and request.scope['path'] not in ('/', '/health'):
        raise HTTPException(401, 'the API key is missing or wrong', {'WWW-Authenticate': 'Bearer'})


app = FastAPI(openapi_url=None, dependencies=[Depends(check_access)])
READ = ['GET', 'HEAD']


def error_body(is_ollama, status, message):
    if is_ollama:
        return {'error': message}
    kind = 'invalid_request_error' if status < 500 else 'server_error'
    return {'error': {'message': message, 'type': kind, 'param': None, 'code': status}}


@app.exception_handler(HTTPException)
async def on_error(request, error):
    is_ollama = request.scope['path'].startswith('/api/')
    body = error_body(is_ollama, error.status_code, error.detail)
    return JSONResponse(body, error.status_code, error.headers)


@app.post('/v1/completions')
@app.post('/v1/chat/completions')
@app.post('/api/generate')
@app.post('/api/chat')
async def generate(request: Request):
    path = request.scope['path']
    is_ollama = path.startswith('/api/')
    is_chat = 'chat' in path
    headers = {}
    asked = await parse_request(request, headers)
    if is_ollama and not asked.messages and not asked.prompt:  # so its clients load a model
        return {'model': asked.model, 'created_at': now(), 'response': '', 'done': True,
                'done_reason': 'load', 'message': {'role': 'assistant', 'content': ''}}
    is_raw = not is_chat and (asked.raw or not is_ollama)
    answers = enqueue(asked, read_prompts(asked, is_raw, headers))
    reply = (OllamaReply if is_ollama else OpenAIReply)(asked, answers, is_chat)
    is_stream = asked.stream is not False if is_ollama else bool(asked.stream)
    if is_stream:
        return StreamingResponse(reply.lines(), media_type=reply.media_type, headers=headers)
    pieces = await whole_pieces(request, answers)
    if len(pieces) < len(answers):
        return PlainTextResponse('')  # nobody is there to read it
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        raise HTTPException(500, errors[0])
    return JSONResponse(reply.whole(pieces), headers=headers)


class Reply:
    """The answers to a request, in a dialect."""

    def __init__(self, asked, answers, is_chat):
        self.asked = asked
        self.answers = answers
        self.is_chat = is_chat
        self.id = ('chatcmpl-' if is_chat else 'cmpl-') + secrets.token_hex(12)
        self.created = int(time.time())


# -----------------------------------------------------------------------------
# OpenAI's dialect

class OpenAIReply(Reply):
    media_type = 'text/event-stream'

    def head(self, ending=''):
        kind = 'chat.completion' + ending if self.is_chat else 'text_completion'
        return {'id': self.id, 'object': kind, 'created': self.created, 'model': self.asked.model}

    def usage(self):
        n_read = sum(answer.n_prompt for answer in self.answers) // self.asked.n
        n_written = sum(answer.n_new for answer in self.answers)
        return {'prompt_tokens': n_read, 'completion_tokens': n_written, 'total_tokens': n_read + n_written}

    def logprobs(self, piece):
        if not piece.tokens:
            return None
        if self.is_chat:
            return {'content': piece.tokens}
        lists = {'tokens': [], 'token_logprobs': [], 'top_logprobs': [], 'text_offset': []}
        for token in piece.tokens:
            # the token itself is always among the likeliest, where these are asked for
            likeliest = [token] + token['top_logprobs'] if piece.answer.n_top else []
            tops = {token_text(bytes(top['bytes']), 'bytes:'): top['logprob'] for top in likeliest}
            lists['tokens'].append(token_text(bytes(token['bytes']), 'bytes:'))
            lists['token_logprobs'].append(token['logprob'])
            lists['top_logprobs'].append(None if token['logprob'] is None else tops)
            lists['text_offset'].append(piece.answer.offset)
            piece.answer.offset += len(piece.answer.decoder.decode(bytes(token['bytes'])))
        return lists

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
    about = served[name].about
    return {'id': name, 'object': 'model', 'created': STARTED, 'owned_by': 'gpt2-sft',
            'root': about['digest'], 'examples': served[name].examples}


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
            end = time.monotonic()
            read = answer.first_token or end
            part |= {'done_reason': answer.ended, 'total_duration': int(1e9 * (end - answer.began)),
                     'load_duration': 0, 'prompt_eval_count': answer.n_prompt,
                     'prompt_eval_duration': int(1e9 * (read - answer.began)),
                     'eval_count': answer.n_new, 'eval_duration': int(1e9 * (end - read))}
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
async def tags():
    return {'models': [model.about for model in served.values()]}


@app.api_route('/api/ps', methods=READ)
async def running_models():
    """All models are loaded, and stay so."""
    more = {'expires_at': '2100-01-01T00:00:00Z', 'size_vram': 0}
    return {'models': [model.about | more for model in served.values()]}


@app.post('/api/show')
async def show(request: Request):
    asked = await parse_request(request, {})
    return served[asked.model].about


# -----------------------------------------------------------------------------
# the page, and what operators look at

@app.api_route('/', methods=READ)  # Ollama's command asks by HEAD whether a server runs
async def page():
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
            seconds = min(READ_SECONDS, request_timeout)
            self.head_timer = self.loop.call_later(seconds, self.transport.close)
        elif self.head_timer and not is_waiting:
            self.head_timer.cancel()
            self.head_timer = None


def check_settings():
    """Read the user's patterns. UserError: the filters or the address are not as they must be."""
    if not set(chain) <= FINDERS.keys() or ('patterns' in chain) != bool(patterns):
        raise UserError(f'filters={filters!r} may name pii, profanity, and patterns with a file, like '
                        '--patterns=mine.txt')
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


def find_examples(about):
    """Up to six rows of a run's own test split, of as many families as there are; [] if it is not here."""
    try:
        rows = read_split(about['config']['dataset'], 'test', 1000).meta
    except (UserError, LookupError):
        return []
    if rows['sha256'] != about['sha256']:
        return []
    examples = {}
    for row in rows['rows']:
        family = row.get('family') or ' '.join(row['instruction'].split()[:3])
        if len(row['instruction'] + row['input']) < 200:
            example = {'title': family, 'instruction': row['instruction'], 'input': row['input']}
            examples.setdefault(family, example)
    return list(examples.values())[:6]


def describe(name, loaded):
    """A model as Ollama's dialect lists it."""
    size = sum(p.numel() for p in loaded.model.parameters())
    return {
        'name': name, 'model': name, 'modified_at': now(), 'size': 4 * size,
        'digest': loaded.made_of['weights'],
        'details': {'format': 'pytorch', 'family': 'gpt2', 'families': ['gpt2'], 'parent_model': '',
                    'parameter_size': f'{size / 1e6:.0f}M', 'quantization_level': 'F32'},
        'model_info': {'general.architecture': 'gpt2', 'gpt2.context_length': loaded.model.config.block_size},
        'template': BEFORE_INSTRUCTION + '{{ .Prompt }}' + RESPONSE_HEADER, 'capabilities': ['completion']}


def load_models():
    """Fill served: with the run's model and the one it came from, or with the one that init_from names."""
    chosen_device, compute_dtype = choose_device(device, dtype)
    run = find_run(config)
    examples = []
    loaded = {}
    if run:
        loaded[run.stem] = load_run(run)
        examples = find_examples(read_json(run))
    else:
        model = load_named(init_from, cache_dir, download_from)
        loaded[model.model.config.name] = model
    if run and before:
        loaded[run.stem.removesuffix('-sft') + '-before'] = load_base(run, cache_dir, download_from)
    for name, model in loaded.items():
        about = describe(name, model)
        for_inference(model.model, chosen_device, compute_dtype)
        engine = ServingEngine(model.model, 1e9 * cache_gb / len(loaded))
        served[name] = Served(engine, about, examples)


async def run_until_one_ends(listener):
    """Serve and compute. SIGTERM and Ctrl-C: no new connections, those who wait are answered, exit code 0."""
    server = uvicorn.Server(uvicorn.Config(
        app, http=TimedProtocol, ws='none', log_level='warning', access_log=False, lifespan='off',
        timeout_graceful_shutdown=request_timeout))
    tasks = [asyncio.create_task(server.serve(sockets=[listener])), asyncio.create_task(compute())]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    done.pop().result()


def main():
    check_settings()
    listener = listen()
    thread.submit(load_models).result()
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)  # uvicorn handles them, and raises them again at the end
    name = f'[{host}]' if ':' in host else host
    print(f'{", ".join(served)}: http://{name}:{listener.getsockname()[1]}', flush=True)
    asyncio.run(run_until_one_ends(listener))


if __name__ == '__main__':
    main()
