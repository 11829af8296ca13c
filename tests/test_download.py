"""Downloads from a server in the test that breaks in every way: what is kept is whole and right, or nothing is."""
import gzip
import hashlib
import json
import multiprocessing
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import model as module
from model import GPT, GPTConfig, ModelError, download

import numpy as np
import pytest
import requests
import torch
import urllib3
from conftest import ROOT
from test_load import huggingface_tensors, same, write_openai

BODY = bytes(range(256)) * 800  # 204,800 bytes: several chunks
PAGE = b'<?xml version="1.0" encoding="utf-8"?>\n<Error><Code>BlobNotFound</Code></Error>'
INDEX, DATA = 'model.ckpt.index', 'model.ckpt.data-00000-of-00001'


class Handler(BaseHTTPRequestHandler):

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        path = self.path
        span = self.headers.get('Range')
        server.log.append((path, span))
        answers = server.answers.get(path, [])
        answer = answers.pop(0) if answers else 'ok'
        body = PAGE if answer == 'page' else server.files.get(path)
        code = answer if isinstance(answer, int) else 404 if body is None else 200
        if code != 200:
            return self.answer(code, PAGE)
        start = 0
        head = {}
        if answer == 'page':
            head = {'Content-Type': 'text/html; charset=utf-8'}
        elif answer != 'no ranges':
            start = 0 if answer == 'other range' else int(span[6:-1])
            if start >= len(body):
                return self.answer(416, b'')
            code = 206
            head = {'Content-Range': f'bytes {start}-{len(body) - 1}/{len(body)}'}
        if answer == 'slow':
            time.sleep(1)
        if answer in ('cut', 'stall', 'cut, no length'):
            half = body[start:start + (len(body) - start) // 2]
            self.answer(code, half, head, -1 if 'no length' in answer else len(body) - start)
            if answer == 'stall':
                server.woken.wait(20)
            self.close_connection = True
            return None
        return self.answer(code, body[start:], head)

    def answer(self, code, body, head=(), length=None):
        self.send_response(code)
        length = len(body) if length is None else length
        for key, value in (dict(head) | ({'Content-Length': length} if length >= 0 else {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


@pytest.fixture
def server(monkeypatch):
    """A server with .files {path: bytes}, .answers {path: what goes wrong, in turn} and .log [(path, Range)]; .url."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.files = {'/a': BODY, '/b': BODY}
    server.answers = {}
    server.log = []
    server.woken = threading.Event()
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(urllib3.Retry, 'get_backoff_time', lambda self: 0.01)
    monkeypatch.setattr(module, 'TIMEOUT', (2, 0.3))
    yield server
    server.woken.set()
    server.shutdown()
    server.server_close()
    thread.join()


def names_in(folder):
    """The files in it, without the lock that processes take turns by."""
    return sorted(path.name for path in folder.iterdir() if path.name != '.lock')


def fault_of(call, *args, **settings):
    """The message of the ModelError; one line, always."""
    with pytest.raises(ModelError) as error:
        call(*args, **settings)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.fixture
def get(server, tmp_path):
    """get(...) -> download of /a, then /b, checked to be whole, and to leave nothing aside."""
    def get(size=204_800, **settings):
        path = tmp_path / 'deep' / 'file'
        assert download([server.url + '/a', server.url + '/b'], path, size, **settings) == path
        assert path.read_bytes() == BODY and names_in(path.parent) == ['file']
        return server.log
    return get


START = 'bytes=0-'


@pytest.mark.parametrize('size', [0, len(BODY)])
def test_once(get, server, size, capsys):
    assert get(size) == [('/a', START)]
    assert get(size) == [('/a', START)]  # not again
    assert capsys.readouterr() == (f'downloading {server.url}/a\n', '')  # no bar where there is no terminal


def test_bar_on_a_terminal(get, tmp_path, monkeypatch, capsys):
    part(tmp_path, BODY[:100_000])
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    get()
    err = capsys.readouterr().err
    assert '100%' in err and '205k/205k' in err


def part(tmp_path, data):
    (tmp_path / 'deep').mkdir()
    (tmp_path / 'deep' / 'file.part').write_bytes(data)


def test_resumes_a_partial_file(get, tmp_path):
    part(tmp_path, BODY[:1000])
    assert get() == [('/a', 'bytes=1000-')]


def test_resumes_where_the_hash_is_known(get, tmp_path):
    part(tmp_path, BODY[:1000])
    assert get(0, sha256=hashlib.sha256(BODY).hexdigest()) == [('/a', 'bytes=1000-')]


def test_starts_anew_where_nothing_is_known(get, tmp_path):
    part(tmp_path, b'?' * 1000)
    assert get(0) == [('/a', START)]


@pytest.mark.parametrize('answer', ['no ranges', 'other range'])
def test_a_server_that_sends_the_whole_file_instead_of_its_rest(get, server, tmp_path, answer):
    part(tmp_path, BODY[:1000])
    server.answers['/a'] = [answer]
    assert get() == [('/a', 'bytes=1000-')]


@pytest.mark.parametrize('length', [len(BODY), len(BODY) + 7])
def test_part_that_is_too_long(get, tmp_path, length):
    """It has no rest (416), and is fetched anew."""
    part(tmp_path, b'?' * length)
    assert get() == [('/a', f'bytes={length}-'), ('/b', START)]


@pytest.mark.parametrize('answer', ['cut', 'stall'])
def test_broken_connections_are_resumed(get, server, answer):
    """At the next address, and then at the first one again."""
    server.answers = {'/a': [answer, answer], '/b': [answer]}
    start = time.monotonic()
    log = get()
    assert [path for path, _ in log] == ['/a', '/b', '/a', '/b'] and log[0][1] == START
    have = [int(span[6:-1]) for _, span in log]
    assert len(BODY) // 4 < have[1] < have[2] <= have[3]
    assert time.monotonic() - start < 5


def test_broken_line_of_unknown_size(server, tmp_path):
    server.answers['/a'] = ['cut']
    download([server.url + '/a'], tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY
    assert len(server.log) == 2


@pytest.mark.parametrize('answer', [404, 403, 410])
@pytest.mark.parametrize('size', [0, len(BODY)])
def test_next_address_at_once(get, server, size, answer):
    server.answers['/a'] = [answer]
    assert get(size) == [('/a', START), ('/b', START)]


def test_a_web_page_is_not_the_file(server, tmp_path):
    """Such as GitHub's page about a file, or the login of a network. What there is of the file stays."""
    server.answers['/a'] = ['page']
    (tmp_path / 'file.part').write_bytes(BODY[:1000])
    assert fault_of(download, [server.url + '/a'], tmp_path / 'file', len(BODY)) == f'cannot download file: {server.url}/a: it is a web page'
    assert names_in(tmp_path) == ['file.part'] and (tmp_path / 'file.part').stat().st_size == 1000


@pytest.mark.parametrize('other', [BODY[:-1], BODY + b'!'])
def test_wrong_size_is_not_kept(server, tmp_path, other):
    server.files['/a'] = other
    assert f'another file was sent, of {len(other):,} bytes' in fault_of(download, [server.url + '/a'], tmp_path / 'file', len(BODY))
    assert not names_in(tmp_path)


@pytest.mark.parametrize('answers', [[503], [429, 500, 502]])
def test_busy_servers_are_asked_again(get, server, answers):
    server.answers['/a'] = list(answers)
    assert get() == [('/a', START)] * (1 + len(answers))


def test_busy_for_long(get, server):
    server.answers['/a'] = [503] * 9
    assert [path for path, _ in get()] == ['/a'] * 4 + ['/b']


def test_nobody_answers(server, tmp_path, capfd):
    server.answers = {'/a': ['cut'] + [503] * 20, '/b': [404] * 3}
    dead = 'http://127.0.0.1:1/c'
    fault = fault_of(download, [server.url + '/a', server.url + '/b', dead], tmp_path / 'file', len(BODY))
    assert f'{server.url}/a: too many 503 error responses; {server.url}/b: 404 Client Error' in fault and f'{dead}: ' in fault
    assert names_in(tmp_path) == ['file.part']  # what there is of it, to be resumed
    assert BODY.startswith((tmp_path / 'file.part').read_bytes())
    assert capfd.readouterr().err == ''  # no line for every attempt


def test_wrong_hash_is_not_kept(server, tmp_path):
    server.files['/a'] = b'?' + BODY[1:]
    url = server.url + '/a'
    sha256 = hashlib.sha256(BODY).hexdigest()
    assert 'sha256' in fault_of(download, [url], tmp_path / 'file', len(BODY), sha256)
    assert not names_in(tmp_path)
    server.files['/a'] = BODY
    assert download([url], tmp_path / 'file', 0, sha256).read_bytes() == BODY


def test_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / 'x').write_text('a file')
    assert 'cannot write' in fault_of(download, [server.url + '/a'], tmp_path / 'x' / 'file')


def test_processes_take_turns(server, tmp_path, monkeypatch):
    """Two processes that want the same file: one downloads, the other waits and finds it, whole."""
    server.answers['/a'] = ['slow', 'slow']
    monkeypatch.setattr(module, 'TIMEOUT', (10, 10))
    fork = multiprocessing.get_context('fork')
    processes = [fork.Process(target=download, args=([server.url + '/a'], tmp_path / 'deep/file', len(BODY))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert server.log == [('/a', START)] and (tmp_path / 'deep/file').read_bytes() == BODY


def test_a_complete_cache_needs_no_lock(get, monkeypatch):
    """A cache that others may only read: what is there and right is found without writing a byte."""
    import filelock
    get()

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(filelock, 'FileLock', refuse)
    assert get() == [('/a', START)]


def test_certificates_are_checked(get, monkeypatch):
    asked = []
    send = requests.Session.send
    monkeypatch.setattr(requests.Session, 'send', lambda self, r, **k: asked.append(k['verify']) or send(self, r, **k))
    get()
    assert asked and all(asked)
    assert all('verify=' not in path.read_text() for path in ROOT.glob('*.py'))


# --- the released models, from addresses of our own


SMALL = {'n_vocab': 40, 'n_ctx': 8, 'n_embd': 128, 'n_head': 2, 'n_layer': 1}


@pytest.fixture
def released(server, monkeypatch, tmp_path):
    """load(...) -> the paths asked for by GPT.from_pretrained('gpt2'), which is a small model under its three addresses."""
    from safetensors.torch import save
    monkeypatch.setattr(module, 'OPENAI_URLS', (server.url + '/first', server.url + '/backup'))
    monkeypatch.setattr(module, 'HUGGING_FACE_URL', server.url + '/hf')
    source = tmp_path / 'source'
    write_openai(source, SMALL)
    reference = GPT.from_pretrained(source)
    hf = save(huggingface_tensors(reference))
    monkeypatch.setitem(module.RELEASED, 'gpt2', ('124M', (source / DATA).stat().st_size))
    monkeypatch.setitem(module.HUGGING_FACE_SHA256, 'gpt2', hashlib.sha256(hf).hexdigest())
    # no file beside them tells the shape, and so small a width has no usual number of heads
    monkeypatch.setattr(module, 'guess_config', lambda tensors, path, beside: GPTConfig(8, 40, 1, 2, 128))
    server.files = {f'/{base}/124M/{name}': (source / name).read_bytes() for base in ('first', 'backup') for name in (INDEX, DATA)}
    server.files['/hf/gpt2/resolve/main/model.safetensors'] = hf
    server.cache = tmp_path / 'cache' / 'gpt2'

    def load(**settings):
        server.log.clear()
        model = GPT.from_pretrained('gpt2', **{'cache_dir': str(tmp_path / 'cache')} | settings)
        assert same(model, reference) and model.config == reference.config
        return [path for path, _ in server.log]
    return load


def both(base):
    return [f'/{base}/124M/{name}' for name in (DATA, INDEX)]


def test_openais_files(released, server):
    assert released() == both('first')
    assert names_in(server.cache) == sorted([INDEX, DATA])
    assert released() == []


def test_backup_address(released, server):
    for name in INDEX, DATA:
        server.answers[f'/first/124M/{name}'] = [404]
    assert released() == [path for pair in zip(both('first'), both('backup')) for path in pair]
    assert released() == []


@pytest.mark.parametrize('name', [DATA, INDEX])
@pytest.mark.parametrize('damage', [lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], lambda data: data[:-9]],
                         ids=['flipped', 'cut'])
def test_a_damaged_file_in_the_cache_is_told_and_removed(released, server, name, damage):
    released()
    file = server.cache / name
    good = file.read_bytes()
    file.write_bytes(damage(good))
    fault = fault_of(released)
    assert f'cannot read {file}' in fault and 'start again' in fault and server.log == []
    assert not file.exists() and len(names_in(server.cache)) == 1
    assert released() == [f'/first/124M/{name}']
    assert file.read_bytes() == good


@pytest.mark.parametrize('error', [OSError(12, 'Cannot allocate memory'), OSError(5, 'Input/output error')])
def test_a_fault_of_the_machine_costs_no_download(released, server, monkeypatch, error):
    """Out of memory, or a disk that fails, proves nothing against the files: they stay."""
    released()
    files = names_in(server.cache)

    def fail(*args, **kwargs):
        raise error
    with monkeypatch.context() as context:
        context.setattr(np, 'memmap', fail)
        fault = fault_of(released)
    assert error.strerror in fault and 'removed' not in fault and names_in(server.cache) == files
    assert released() == []


def test_flipped_byte_at_the_address(released, server):
    good = server.files[f'/first/124M/{DATA}']
    server.files[f'/first/124M/{DATA}'] = good[:-1] + bytes([good[-1] ^ 64])
    assert 'its checksum differs' in fault_of(released)
    server.files[f'/first/124M/{DATA}'] = good
    assert released() == [f'/first/124M/{DATA}']


def test_page_for_hparams_in_the_cache(released, server):
    """Saved by hand; the file is not needed, as the widths of the released models tell their heads."""
    released()
    (server.cache / 'hparams.json').write_bytes(PAGE)
    assert f'cannot read {server.cache / "hparams.json"}' in fault_of(released)
    assert released() == []


def test_falls_back_to_hugging_face(released, server):
    for base in 'first', 'backup':
        server.answers[f'/{base}/124M/{DATA}'] = [404] * 9
    assert released()[-1] == '/hf/gpt2/resolve/main/model.safetensors'
    assert released() == []


def test_prefers_hugging_face(released, server):
    assert released(download_from='huggingface') == ['/hf/gpt2/resolve/main/model.safetensors']
    assert released(download_from='huggingface') == []


def test_falls_back_to_openai(released, server):
    hf = '/hf/gpt2/resolve/main/model.safetensors'
    server.files[hf] = server.files[hf][:-4] + b'\0\0\0\0'  # seen by its sha256
    assert released(download_from='huggingface') == [hf, *both('first')]


def test_no_address_answers(released, server):
    server.files = {}
    assert f'cannot download {DATA}: {server.url}/first/124M/{DATA}' in fault_of(released)
    assert not names_in(server.cache)
    # each address was tried, and the line says where the files may be put by hand
    asked = {path for path, _ in server.log}
    assert asked == {f'/first/124M/{DATA}', f'/backup/124M/{DATA}', '/hf/gpt2/resolve/main/model.safetensors'}
    fault = fault_of(released)
    assert fault.startswith(f'without a network put the files of gpt2 into {server.cache}; cannot download {DATA}: ')
    assert fault.count('404 Client Error') == 2


def test_default_cache(released, monkeypatch, tmp_path):
    for variable, cache in ('XDG_CACHE_HOME', tmp_path / 'xdg'), ('HOME', tmp_path / 'home' / '.cache'):
        monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
        monkeypatch.setenv(variable, str(tmp_path / variable.split('_')[0].lower()))
        released(cache_dir='')
        assert (cache / 'gpt2-sft' / 'gpt2' / INDEX).exists()


@pytest.mark.parametrize('name, n_layer, n_embd, parameters', [
    ('gpt2', 12, 768, 124_439_808), ('gpt2-medium', 24, 1024, 354_823_168),
    ('gpt2-large', 36, 1280, 774_030_080), ('gpt2-xl', 48, 1600, 1_557_611_200)])
def test_released_shapes(name, n_layer, n_embd, parameters):
    with torch.device('meta'):
        tensors = GPT(GPTConfig(n_layer=n_layer, n_head=1, n_embd=n_embd)).state_dict()
        config = module.guess_config(tensors, 'model.ckpt.index', 'hparams.json')
        model = GPT(config)
    assert config == GPTConfig(n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert module.RELEASED[name][1] == 4 * parameters


def test_prepare_reads_an_address_with_a_query(server, run, tmp_path):
    """What the file is follows from the address's path, as on Hugging Face's hub: .../rows.jsonl.gz?download=true."""
    rows = [{'instruction': f'Task {i}', 'input': '', 'output': 'x'} for i in range(60)]
    server.files['/rows.jsonl.gz?download=true'] = gzip.compress('\n'.join(map(json.dumps, rows)).encode())
    run('prepare.py', f'--source={server.url}/rows.jsonl.gz?download=true', '--dataset=x')
    assert json.loads((tmp_path / 'data/x/train.json').read_text())['examples'] == 51
