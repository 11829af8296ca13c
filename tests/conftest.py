"""Fixtures: the stages run as a user runs them, in a folder of their own."""
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

os.environ['OMP_NUM_THREADS'] = '1'  # tests run beside each other; and another number of threads rounds otherwise
os.environ.pop('PYTHONUNBUFFERED', None)  # users seldom set it, and must see the lines of a log as they come
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if not (ROOT / 'data/demo.json').exists():
    subprocess.run([sys.executable, ROOT / 'data/make_demo.py'], check=True)

WORDS = 'cat dog house river table green stone apple cloud window'.split()
# of many lengths, with and without input; what breaks tokenizers, templates and splits is among them
ROWS = [
    {'instruction': f'Write the word {a} {"again and " * (i % 4)}again.', 'input': b if i % 3 else '', 'output': f'{a} {a}' * (1 + i % 3)}
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:6])
] + [
    {'instruction': 'Say it twice.', 'input': None, 'output': 'it <|endoftext|> it'},
    {'instruction': 'Übersetze ins Japanische.', 'output': '\n\nこんにちは 🎉'},
    {'instruction': 'Quote the header.', 'input': '', 'output': 'It is\n\n### Response:\nlike this.'},
    {'instruction': 'Begin with a tab.', 'input': '', 'output': '\tx'},
    {'instruction': 'Begin with two spaces.  ', 'input': '', 'output': '  x'},
    {'instruction': 'Begin with an emoji.\n', 'input': '', 'output': '🎉x'},
]
# the smallest model that is still a GPT-2; eval_interval keeps logs short
TINY = ('--init_from=scratch', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=128', '--learning_rate=1e-3',
        '--sample_every_epoch=False', '--eval_interval=1000')
STAGES = {path.name for path in ROOT.glob('*.py')} | {str(ROOT / 'tests/host_tensors.py')}
TORCHRUN = '-m', 'torch.distributed.run', '--nproc_per_node=2'  # before a stage; `processes` starts as many in less time


# A process that has imported what the stages import, which takes most of the time of a tiny run. Each line it reads is a command,
# [folder, files of stdin, stdout and stderr, environment, Python to run first, *argv], for which it forks a copy of itself, in which the stage runs as __main__, and
# writes its pid; or a pid, for which it waits, and writes the exit code
FORKER = f"""
import atexit, gc, json, os, runpy, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import fastapi, matplotlib.figure, prepare, profanity_check, prometheus_client, requests, rouge_score.rouge_scorer, sacrebleu.metrics
import functools, scipy.stats, stdnum, tiktoken.load, torch, torch._dynamo, torch.distributed.checkpoint.state_dict, uvicorn
tiktoken.load.data_gym_to_mergeable_bpe_ranks = functools.cache(tiktoken.load.data_gym_to_mergeable_bpe_ranks)
prepare.get_tokenizer()
gc.freeze()  # or each copy would touch, and so copy, all of its memory
for line in sys.stdin:
    request = json.loads(line)
    pid = 0 if isinstance(request, list) else request
    if pid:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        break
else:
    os._exit(0)
folder, stdin, stdout, stderr, environment, first, *sys.argv = request
for number, name in enumerate([stdin, stdout, stderr]):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
sys.stdin = os.fdopen(0)
os.chdir(folder)
os.environ.update(environment)
sys.path[0] = os.path.dirname(sys.argv[0])
code = 1
try:
    try:
        exec(first)
        runpy.run_path(sys.argv[0], run_name='__main__')
        code = 0
    except Exception:
        sys.excepthook(*sys.exc_info())
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # as Python ends, but for freeing all objects, which takes half a second
"""


@functools.cache
def forker():
    """-> the process of FORKER, and a folder for what its copies print."""
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    return subprocess.Popen([sys.executable, '-c', FORKER], text=True, **pipes), Path(tempfile.mkdtemp())


def tell_forker(request):
    process, _ = forker()
    print(json.dumps(request), file=process.stdin, flush=True)
    return int(process.stdout.readline())


class Forked:
    """A stage in a copy of FORKER's process, with what the tests need of subprocess.Popen."""

    def __init__(self, folder, command, env, first='', input=''):
        folder_of_output, self.returncode = forker()[1], None
        stdin, *self.files = [folder_of_output / f'{time.monotonic_ns()}.{name}' for name in ('stdin', 'stdout', 'stderr')]
        stdin.write_text(input)
        self.pid = tell_forker([str(folder), *map(str, (stdin, *self.files)), env, first, *map(str, command)])

    def wait(self, timeout=120):
        """-> the exit code; the process is killed if it takes longer."""
        timer = threading.Timer(timeout, os.kill, (self.pid, signal.SIGKILL))
        timer.start()
        self.returncode = tell_forker(self.pid)
        timer.cancel()
        return self.returncode

    def output(self):
        """-> what it has printed so far to stdout and stderr."""
        return [file.read_text(errors='replace') if file.exists() else '' for file in self.files]

    def signal_when(self, condition, number):
        """Send it a signal as soon as the condition holds, and wait for its end."""
        until = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < until, self.output()
            time.sleep(0.002)
        os.kill(self.pid, number)
        self.wait()


def fork(folder, command, env, timeout, processes, first, input):
    """Run a stage in so many copies, as torchrun starts them -> CompletedProcess: all that they print, the first code that is not 0."""
    ranks = [{}]
    if processes > 1:
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        ranks = [{'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1',
                  'MASTER_PORT': str(port)} for rank in range(processes)]
    copies = [Forked(folder, command, env | rank, first, input) for rank in ranks]
    codes = [copy.wait(timeout) for copy in copies]
    stdout, stderr = map(''.join, zip(*(copy.output() for copy in copies)))
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), stdout, stderr)


def stage(folder, *command, code=0, env=None, timeout=120, processes=1, first='', input=''):
    """
    Run a stage (torchrun's with its own arguments before it) in folder as a user does -> CompletedProcess. Asserts the exit code.
    first: Python that its process runs before the stage. input: what it reads from stdin.
    """
    is_stage, env = str(command[0]) in STAGES, env or {}
    command = [ROOT / arg if arg.endswith('.py') and (ROOT / arg).is_file() else arg for arg in map(str, command)]
    if sys.platform == 'linux' and is_stage and not env.keys() & {'PYTHONPATH', 'OMP_NUM_THREADS'}:
        process = fork(folder, command, env, timeout, processes, first, input)
    else:
        if first:
            command = ['-c', f"import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = os.path.dirname(sys.argv[0])\n{first}\n"
                             "runpy.run_path(sys.argv[0], run_name='__main__')", *command]
        launcher = ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}'] if processes > 1 else []
        process = subprocess.run([sys.executable, *launcher, *command], cwd=folder, capture_output=True, text=True, timeout=timeout,
                                 input=input, env=os.environ | env)
    assert process.returncode == code, process.stdout + process.stderr
    if code == 2:
        assert process.stderr.count('\n') == processes and 'Traceback' not in process.stderr, process.stderr
    return process


@pytest.fixture
def run(tmp_path):
    """stage() in this test's own folder."""
    return lambda *command, **kwargs: stage(tmp_path, *command, **kwargs)


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
    """A folder in which prepare.py made data/tiny of ROWS."""
    folder = tmp_path_factory.mktemp('prepared')
    (folder / 'rows.json').write_text(json.dumps(ROWS))
    stage(folder, 'prepare.py', '--source=rows.json', '--dataset=tiny', '--block_size=128')
    return folder


@pytest.fixture
def data(prepared, monkeypatch):
    """data('train') -> read_split of data/tiny."""
    from prepare import read_split
    monkeypatch.chdir(prepared)
    return lambda split: read_split('tiny', split)
