"""
serve.py under load and beside other servers, its soak, and what its filters find in data/filter_cases.jsonl.

    python tests/bench.py --only=serve              # GPT-2 Small's shape; --size=medium, --turns=1, --quick
    python tests/bench.py --only=filters
    python tests/bench_serve.py sharing             # how requests share a server: a table in Markdown; a trial: sharing quick

sharing compares with transformers serve and llama.cpp's server, if transformers[serving] and xllamacpp are installed, in this Python or in
the one that PEER_PYTHON names.

What is compared is measured in turns, warm, and the medians are shown; a server that waits computes nothing.
"""
import contextlib
import http.client
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from engine import choose_device, for_inference, generate  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from prepare import encode_prompt  # noqa: E402

import torch  # noqa: E402
from bench import SHAPES, race, table  # noqa: E402

NEW = 24  # tokens an answer, greedy
PATHS = '/v1/chat/completions', '/v1/completions', '/api/chat', '/api/generate'
# what the soak sends: texts that may be answered, bodies that may not, and the status of these
ODD_TEXTS = ['\0', 'a\0b', '\ud800', 'x \udfff\ud800 y', '\U0001f600' * 40, 'e\u0301\u200d\u202e abc', '\u2028\u0085',
             '\uffff', '数えて' * 20, '<|endoftext|>', '### Response:', '[email] a@b.de +49 30 1234567']
MALFORMED = [b'', b'{', b'nul', b'7', b'[1]', b'{"prompt": "a}', b'\xff\xfe\0', b'[' * 60_000, b'{"a":' * 15_000]
WRONG = {400: [{'temperature': -1}, {'temperature': float('nan')}, {'n': 999}, {'stop': 7}, {'prompt': {}},
               {'messages': [7]}, {'prompt': [50257]}, {'prompt': ' '}, {'options': 'x'},
               {'prompt': 'x ' * 20_000}],
         404: [{'model': 'absent'}, {'model': '\ud800'}], 413: [{'prompt': 'x' * 1_000_000}]}

def write_run(folder, shape):
    """A run as train.py writes it, of random weights so large that an answer depends on the whole prompt; not so large that rounding decides."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(zip(('n_layer', 'n_head', 'n_embd'), shape))))
    for p in model.h.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    torch.save(model.state_dict(), folder / f'{model.config.name}-sft.pth')
    about = {'model': asdict(model.config), 'init_from': 'scratch', 'sha256': '', 'config': {}, 'step': 0, 'val_loss': 0.0}
    (folder / f'{model.config.name}-sft.json').write_text(json.dumps(about))

@contextlib.contextmanager
def server(folder, *command, python=sys.executable, env=None):
    """Start a server -> (its process, port, log), when it answers. RuntimeError: it ended, or does not answer in five minutes."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    log = Path(folder, f'{port}.log')
    with log.open('w') as file:
        process = subprocess.Popen([*filter(None, [python]), *command, f'--port={port}'], stdout=file, stderr=file, cwd=ROOT,
                                   env=os.environ | {'HF_HUB_OFFLINE': '1'} | (env or {}))
    deadline = time.monotonic() + 300
    try:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if ask(port, '/health')[0] == 200:
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError(log.read_text().strip().split('\n')[-1])
        yield process, port, log
    finally:
        process.kill()
        process.wait()

def ours(folder, *flags):
    return server(folder, 'serve.py', f'--out_dir={folder}', '--before=False', *flags)

def ask(port, path, body=None, slow=False, connection=None):
    """-> (status, content) of a request; body: bytes, or None to get a page."""
    connection = connection or http.client.HTTPConnection('127.0.0.1', port, timeout=600)
    connection.connect() if not connection.sock else None
    if slow:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.request('GET' if body is None else 'POST', path, body, {'Content-Type': 'application/json'})
    response, content = connection.getresponse(), b''
    while part := response.read(2000 if slow else None):
        content += part
        time.sleep(0.02 if slow else 0)
    return response.status, content.decode()

# --- speed

def load(port, rows, clients):
    """`clients` connections at once, each sends its share of the rows, one after the other -> (new tokens, text) of each row."""
    def client(i):
        connection, found = http.client.HTTPConnection('127.0.0.1', port, timeout=600), []
        for row in rows[i::clients]:
            message = {'role': 'user', 'content': row['instruction']}
            body = json.dumps({'messages': [message], 'max_tokens': NEW, 'temperature': 0, 'input': row.get('input', '')}).encode()
            status, content = ask(port, PATHS[0], body, connection=connection)
            if status != 200:
                raise RuntimeError(f'{status} {content[:200]}')
            answer = json.loads(content)
            found.append((answer['usage']['completion_tokens'], answer['choices'][0]['message']['content']))
        return found

    with ThreadPoolExecutor(clients) as pool:
        shares = list(pool.map(client, range(clients)))
    return [shares[i % clients][i // clients] for i in range(len(rows))]

def speeds(cases, turns):
    """{name: function -> (new tokens, text) of each answer} -> {name: (tokens/s, its answers)}"""
    answers = {}
    seconds = race({name: lambda name=name: answers.update({name: cases[name]()}) for name in cases}, turns)
    return {name: (sum(n for n, _ in answers[name]) / seconds[name], answers[name]) for name in cases}

def bench_clients(port, rows, turns):
    found = speeds({n: partial(load, port, rows * min(n, 4), n) for n in (1, 8, 32)}, turns)
    table(f'serve.py by clients at once, {NEW} new tokens an answer', ('clients', 'answers', 'tokens/s', 'x', 'bar'), [
        (n, len(answers), f'{speed:.1f}', f'{speed / found[1][0]:.2f}', '>= 6' if n == 32 else '')
        for n, (speed, answers) in found.items()])

def bench_overhead(folder, port, rows, turns):
    """One client, beside a process without a server, which does what sample.py --prompt does."""
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    child = subprocess.Popen([sys.executable, __file__, 'alone', folder], **pipes)

    def alone():
        print(json.dumps(rows), file=child.stdin, flush=True)
        return [(n, '') for n in json.loads(child.stdout.readline())]

    found = speeds({'serve.py': partial(load, port, rows, 1), 'alone': alone}, 2 * turns + 1)
    child.kill()
    assert len({sum(n for n, _ in answers) for _, answers in found.values()}) == 1, 'they did not write as many tokens'
    served, generated = found['serve.py'][0], found['alone'][0]
    table(f'one prompt at a time, {len(rows)} answers', ('serve.py, tokens/s', 'engine.generate, tokens/s', 'more time in serve.py', 'bar'), [
        (f'{served:.1f}', f'{generated:.1f}', f'{100 * (generated / served - 1):.1f} %', '<= 5 %')])

def answer_alone(folder):
    """The process that bench_overhead asks: a line of rows on stdin -> a line of how many tokens each answer has."""
    device, dtype = choose_device('cpu', 'float32')
    with contextlib.redirect_stdout(sys.stderr):
        model = for_inference(GPT.from_pretrained(next(Path(folder).glob('*.pth'))), device, dtype)
    for rows in map(json.loads, sys.stdin):
        print(json.dumps([len(generate(model, [encode_prompt(row)], NEW)[0]) for row in rows]), flush=True)


# --- sharing: how long a stream stands still beside others, and what many clients get

THREADS = {'OMP_NUM_THREADS': '2', 'MKL_NUM_THREADS': '2'}
LIMIT = 240  # seconds after which a stream is given up
LONG = 'word ' * 850  # with the template about 900 tokens


def stream(port, model, text, n, on_first=None):
    """Ask for a stream -> (when it was asked for, when each piece of text came, when it ended)."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=LIMIT)
    began = time.perf_counter()
    body = {'model': model, 'messages': [{'role': 'user', 'content': text}], 'max_tokens': n, 'stream': True}
    connection.request('POST', PATHS[0], json.dumps(body | GREEDY), {'Content-Type': 'application/json'})
    times = []
    with contextlib.suppress(TimeoutError):  # it stands still for as long as it may
        response = connection.getresponse()
        while (line := response.readline()) and time.perf_counter() - began < LIMIT:
            choices = json.loads(line[6:]).get('choices') if line.startswith(b'data: {') else None
            if choices and (choices[0].get('delta') or {}).get('content'):
                times.append(time.perf_counter())
                if on_first and len(times) == 1:
                    on_first()
    connection.close()
    return began, times, time.perf_counter()


GREEDY = {'temperature': 0}
# the servers beside ours, as Python of a process that has their packages: arguments are the model and --port=
TRANSFORMERS = """
import sys
from transformers.cli.transformers import app
sys.argv = ['transformers', 'serve', sys.argv[1], '--continuous-batching', '--device=cpu', sys.argv[2]]
app()
"""
LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = int(sys.argv[2].partition('=')[2])
params.n_parallel, params.n_ctx = 32, 32 * 1024
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
server = xllamacpp.Server(params)
time.sleep(10 ** 6)
"""


class Sizes(NamedTuple):
    """How much the comparison does; the trial's tell nothing but that it runs."""
    stream: int = 100  # tokens of the stream that is watched
    askers: int = 3  # who ask for one token again and again
    prompts: int = 30  # of 900 tokens, which arrive while it runs
    clients: int = 32  # at once, each of which streams two answers
    answer: int = 32  # tokens of these


TRIAL = Sizes(stream=20, askers=1, prompts=2, clients=3, answer=6)


def gap_beside(port, model, others, n):
    """A stream of n tokens beside `others`, functions(is_over) that run from its first token on -> its longest gap in seconds."""
    is_over = []
    running = []
    with ThreadPoolExecutor(64) as pool:
        on_first = lambda: running.extend(pool.submit(other, is_over) for other in others)  # noqa: E731
        began, times, end = stream(port, model, 'Tell me all about the sea.', n, on_first)
        is_over.append(True)
    for one in running:
        one.result()  # or an error that it met
    # the last token ends the stream
    gaps = [b - a for a, b in zip(times, [*times[1:], end])]
    return max(gaps, default=LIMIT)


def ask_again_and_again(port, model):
    def ask_them(is_over):
        n = 0
        while not is_over:
            stream(port, model, f'Say {n}.', 1)
            n += 1
    return ask_them


def long_prompt(port, model, number):
    return lambda is_over: stream(port, model, f'{number} {LONG}', 8)


def many_clients(port, model, rows, sizes):
    """Each client streams two answers -> (tokens/s of all, 95th percentile of the seconds to the first token)."""
    def client(i):
        return [stream(port, model, rows[(2 * i + k) % len(rows)]['instruction'], sizes.answer) for k in range(2)]

    began = time.perf_counter()
    with ThreadPoolExecutor(sizes.clients) as pool:
        found = [answer for answers in pool.map(client, range(sizes.clients)) for answer in answers]
    seconds = time.perf_counter() - began
    first = sorted((times or [end])[0] - asked for asked, times, end in found)
    return len(found) * sizes.answer / seconds, first[int(0.95 * len(first))]


def measure_sharing(port, model, rows, sizes):
    """A row of bench_sharing's table."""
    stream(port, model, 'Hello.', 4)  # warm
    short = [ask_again_and_again(port, model)] * sizes.askers
    long = [long_prompt(port, model, i) for i in range(sizes.prompts)]
    gaps = [gap_beside(port, model, others, sizes.stream) for others in ([], short, long)]
    return [f'{value:.2f}' for value in [*gaps, *many_clients(port, model, rows, sizes)]]


def bench_sharing(folder, rows, sizes):
    """Each server runs alone, with two threads; the weights are the same. One that does not run here is named with the reason."""
    python = os.environ.get('PEER_PYTHON', sys.executable)
    huggingface = Path(folder, 'export/huggingface')
    gguf = next(Path(folder, 'export/gguf').glob('*-F32.gguf'))
    servers = [
        ('serve.py', '', [sys.executable, 'serve.py', f'--out_dir={folder}', '--before=False', '--filters=', f'--request_timeout={LIMIT}.0']),
        ('transformers serve --continuous-batching', str(huggingface), [python, '-c', TRANSFORMERS, huggingface]),
        ("llama.cpp's server", 'any', [python, '-c', LLAMA, gguf])]
    lines = []
    for name, model, command in servers:
        try:
            with server(folder, *command, python='', env=THREADS) as (_, port, _):
                lines.append((name, *measure_sharing(port, model, rows, sizes)))
        except (RuntimeError, OSError, http.client.HTTPException, ValueError) as error:
            lines.append((name, 'skipped: ' + f'{error}'[:200], '', '', '', ''))
        print('measured:', *lines[-1], file=sys.stderr, flush=True)
    table(f"a stream of {sizes.stream} tokens: its longest gap alone, beside (a) {sizes.askers} clients that send max_tokens=1 in a loop, (b) while "
          f'{sizes.prompts} prompts of 900 tokens arrive; and {sizes.clients} clients that stream two answers of {sizes.answer} tokens', (
              'server', 'gap alone, s', '(a) gap, s', '(b) gap, s', f'{sizes.clients} clients, tokens/s', 'p95 to the first token, s'), lines)


# --- soak

def to_bytes(body, **more):
    return json.dumps(body | more).encode()

def valid_body(rows, draw, i):
    """-> the i-th (path, body) that can be answered; by index, so that all kinds come."""
    path, text = PATHS[i % 4], draw.choice(ODD_TEXTS) if i % 3 == 2 else draw.choice(rows)['instruction']
    size, stop = draw.randint(1, 40), draw.choice([None, None, 'e', ['qu', ' ']])
    # of two ids: among all 50,257 rounding, which differs from batch to batch, now and then decides
    options = {'temperature': i // 4 % 2, 'top_k': 2, 'seed': i, 'stop': stop}
    body = {'options': options | {'num_predict': size}} if 'api' in path else options | {'max_tokens': size, 'n': 1 + i % 2}
    return path, body | ({'messages': [{'role': 'user', 'content': text}]} if 'chat' in path else {'prompt': text})

def send(port, path, body, slow=False):
    """-> (status, {index: [text, finish reason]} of an answer in either dialect, whole or streamed, or 'error')"""
    status, content = ask(port, path, body, slow)
    found = {}
    for part in [json.loads(line.removeprefix('data: ')) for line in content.split('\n') if '{' in line]:
        if 'error' in part:
            return status, 'error'
        for choice in part.get('choices', [part]):
            message = choice.get('message') or choice.get('delta') or choice
            one = found.setdefault(choice.get('index', 0), ['', None])
            one[0] += message.get('content') or message.get('response') or message.get('text') or ''
            one[1] = choice.get('finish_reason') or choice.get('done_reason') or one[1]
    return status, found

def cut(port, path, body, end, wait, abrupt):
    """Send the first `end` bytes of the body, read for at most `wait` seconds, and hang up."""
    with socket.create_connection(('127.0.0.1', port), timeout=wait) as connection:
        if abrupt:  # a reset in place of a regular end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        head = (f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                f'Content-Length: {len(body)}\r\n\r\n')
        connection.sendall(head.encode() + body[:end])
        with contextlib.suppress(TimeoutError):
            connection.recv(400)
    return 'cut', None

def next_request(valid, expected, draw):
    """-> (kind, function(port) -> (status, answer), what it must give)"""
    kind, stream, i = draw.random(), draw.random() < 0.5, draw.randrange(len(valid))
    path, body = valid[i]
    if kind < 0.5:
        return path + ', streamed' * stream, partial(send, path=path, body=to_bytes(body, stream=stream)), expected[i]
    if kind < 0.6:  # logprobs make the answer long, so that the server has to wait
        body = to_bytes(body, stream=True, logprobs=True, top_logprobs=20)
        return 'slow reader', partial(send, path=path, body=body, slow=True), expected[i]
    if kind < 0.7:
        return 'malformed', partial(send, path=path, body=draw.choice(MALFORMED)), (400, 'error')
    if kind < 0.8:
        status = draw.choice([400, 400, 404, 413])
        body = to_bytes({'prompt': 'a'}, **draw.choice(WRONG[status]))
        return {413: '1 MB'}.get(status, 'wrong fields'), partial(send, path=PATHS[1], body=body), (status, 'error')
    # in words that no request had before, so that what is kept of each would show in the memory
    words = ' '.join(''.join(draw.choices('abcdefghijklmnopqrstuvwxyz', k=7)) for _ in range(100))
    body = to_bytes({'messages': [{'role': 'user', 'content': words}]}, stream=stream)
    kind, end = ('request cut', draw.randrange(len(body))) if kind < 0.9 else ('answer cut', len(body))
    hang_up = partial(cut, path=PATHS[i % 2 * 2], body=body, end=end, wait=draw.uniform(0.01, 0.3), abrupt=i % 3 == 0)
    return kind, hang_up, ('cut', None)

def resident(process):
    """-> MB of its memory; 0: it is dead."""
    status = Path(f'/proc/{process.pid}/status').read_text() if process.poll() is None else ''
    return sum(int(kb) for kb in re.findall(r'VmRSS:\s*(\d+)', status)) / 1e3

def bench_soak(folder, rows, count):
    """`count` requests of random kinds, 64 at once -> what went wrong."""
    draw, counts, faults, memory = random.Random(0), Counter(), [], []
    with ours(folder, '--queue=256') as (process, port, log), ThreadPoolExecutor(64) as pool:
        def play(request):
            kind, function, _ = request
            try:
                while (given := function(port))[0] == 503:
                    counts[kind, '503, sent again'] += 1
                    time.sleep(0.2)
            except (OSError, http.client.HTTPException, ValueError) as error:
                given = repr(error), None
            return request, given

        valid = [valid_body(rows, draw, i) for i in range(count // 20)]
        expected, began = [send(port, path, to_bytes(body, stream=False)) for path, body in valid], time.perf_counter()
        requests = [next_request(valid, expected, draw) for _ in range(count)]
        for part in requests[:count // 4], requests[count // 4:]:
            for (kind, function, must), given in pool.map(play, part):
                counts[kind, given[0]] += 1
                faults += [f'{kind}, {function.keywords["body"][:250]}: {given} in place of {must}'] if given != must else []
            memory.append(resident(process))
        seconds = time.perf_counter() - began
        _, again = play(('', partial(send, path=valid[0][0], body=to_bytes(valid[0][1], stream=False)), None))
        faults += [f'at the end the first request gives {again}'] if again != expected[0] else []
        time.sleep(1)  # for those that were cut last
        _, (_, metrics) = play(('', partial(ask, path='/metrics'), None))
        left = re.findall(r'^(?:active|waiting)_rows .*', metrics, re.M) if metrics else 'no answer'
        faults += [f'at the end: {left}'] if left != ['active_rows 0.0', 'waiting_rows 0.0'] else []
        traces = log.read_text().split('Traceback')[1:]
    faults += [f'{len(traces)} tracebacks; the last ends with {traces[-1][-200:]}'] if traces else []
    growth = 100 * (memory[1] / (memory[0] or 1) - 1)
    # the first 50 requests of --quick do not fill what is kept
    faults += [f'memory grew by {growth:.1f} %'] if growth > 5 and count >= 2000 else []
    table(f'soak: {count} requests, 64 at once, two layers, {seconds:.0f} s', ('kind', 'statuses'), [
        (kind, ', '.join(f'{status}: {n}' for (its, status), n in counts.items() if its == kind))
        for kind in sorted({kind for kind, _ in counts})])
    n_answered = sum(status == 200 for status, _ in expected)
    print(f'\nalone first: {len(valid)} requests, {n_answered} of them answered; resident: {memory[0]:.0f} MB after '
          f'{count // 4}, {memory[1]:.0f} MB at the end, {growth:+.1f} % (bar: 5 %); faults: {len(faults)}',
          *(fault[:600] for fault in faults[:10]), sep='\n', flush=True)
    return faults

def bench_serve(size, rows, turns, quick):
    some = rows[:8 if quick else 32]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as soak_folder:
        write_run(Path(folder), SHAPES[size])
        with ours(folder) as (_, port, _):
            bench_clients(port, some, turns)
            bench_overhead(folder, port, some[:16], turns)
        subprocess.run([sys.executable, 'export.py', f'--out_dir={folder}', '--to=huggingface,gguf'], check=True, cwd=ROOT, stdout=subprocess.PIPE)
        bench_sharing(folder, rows, TRIAL if quick else Sizes())
        write_run(Path(soak_folder), (2, 2, 64))
        if bench_soak(soak_folder, rows, 200 if quick else 2000):
            sys.exit('the soak found faults')

# --- filters

def bench_filters():
    """Precision and recall on the labelled texts: on those by which the filters were tuned, on those that were held back, and on all."""
    import serve
    serve.chain = ['pii', 'profanity']
    lines = (ROOT / 'data' / 'filter_cases.jsonl').read_text(encoding='utf-8').splitlines()
    cases = [json.loads(line) for line in lines]
    rows = []
    for split in 'tune', 'test', 'all':
        found = []
        for case in cases:
            if split in (case['split'], 'all'):
                kinds = set()
                serve.mask(case['text'], kinds)
                found.append(({*case['pii'], *['offensive'] * case['offensive']}, {kind.lower() for kind in kinds}))
        for name, wanted in [*((kind, {kind}) for kind in PII), ('any personal data', PII), ('offensive', {'offensive'})]:
            hits = sum(bool(label & wanted and kinds & wanted) for label, kinds in found)
            n_found = sum(bool(kinds & wanted) for _, kinds in found)
            n_there = sum(bool(label & wanted) for label, _ in found)
            rows.append((split, name, n_there, share(hits, n_found), share(hits, n_there)))
    table(f'filters: {len(cases)} labelled texts, with 95 % intervals', ('texts', 'filter', 'positives', 'precision', 'recall'), rows)


PII = {'email': 0, 'iban': 0, 'card': 0, 'phone': 0}.keys()


def share(hits, count):
    from scipy.stats import binomtest
    low, high = binomtest(hits, count).proportion_ci(method='wilson') if count else (0, 1)
    return f'{hits} of {count}, {100 * hits / max(1, count):.1f} % [{100 * low:.1f}, {100 * high:.1f}]'


def bench_sharing_alone(quick=''):
    """sharing by itself, of random weights in GPT-2 Small's shape, or of two small layers as a trial."""
    rows = [{'instruction': f'Describe the number {i} in words, please.'} for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), (2, 2, 64) if quick else SHAPES['small'])
        command = [sys.executable, 'export.py', f'--out_dir={folder}', '--to=huggingface,gguf']
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
        bench_sharing(folder, rows, TRIAL if quick else Sizes())


if __name__ == '__main__':
    {'alone': answer_alone, 'sharing': bench_sharing_alone, 'filters': bench_filters}[sys.argv[1]](*sys.argv[2:])
