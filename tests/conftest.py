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
STAGES = {path.name for path in ROOT.glob('*.py')} | {'host_tensors.py', 'gpu.py'}
TIME_LIMIT = 300  # seconds for a stage, far more than any of them takes on a machine that does nothing else
TORCHRUN = '-m', 'torch.distributed.run', '--nproc_per_node=2'  # before a stage
NO_PICTURE = "import sys; sys.modules['matplotlib.figure'] = None"  # for stage's `first`: drawing takes half of a tiny run's time


@functools.cache
def forker():
    """The process of forker.py."""
    return subprocess.Popen([sys.executable, ROOT / 'tests/forker.py'], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def tell_forker(request):
    print(json.dumps(request), file=forker().stdin, flush=True)
    return int(forker().stdout.readline())


class Started:
    """A program that runs: a stage in a copy of forker.py's process (on Linux; others do not like forks), any other in a new one."""

    def __init__(self, folder, command, env, first='', input=''):
        output = Path(tempfile.mkdtemp())
        self.returncode = None
        self.process = None
        stdin, *self.files = [output / name for name in ('stdin', 'stdout', 'stderr')]
        stdin.write_text(input)
        command = [str(ROOT / arg) if str(arg) in STAGES else str(arg) for arg in command]
        is_stage = Path(command[0]).name in STAGES and not env.keys() & {'PYTHONPATH', 'OMP_NUM_THREADS'}
        if is_stage and sys.platform == 'linux' and os.environ.get('FORKER') != '0':
            self.pid = tell_forker({'folder': str(folder), 'stdin': str(stdin), 'stdout': str(self.files[0]), 'stderr': str(self.files[1]),
                                    'environment': env, 'first': first, 'argv': command})
            return
        if first:
            command = ['-c', 'import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = os.path.dirname(sys.argv[0])\n'
                             f"{first}\nrunpy.run_path(sys.argv[0], run_name='__main__')", *command]
        with open(stdin) as stdin, open(self.files[0], 'w') as stdout, open(self.files[1], 'w') as stderr:
            self.process = subprocess.Popen([sys.executable, *command], cwd=folder, env=os.environ | env, stdin=stdin, stdout=stdout, stderr=stderr)
        self.pid = self.process.pid

    def wait(self, timeout=TIME_LIMIT):
        """The exit code. A process that takes longer than timeout seconds is killed, and the test fails with these words."""
        was_late = []

        def kill():
            was_late.append(True)
            os.kill(self.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, kill)
        timer.start()
        self.returncode = self.process.wait() if self.process else tell_forker(self.pid)
        timer.cancel()
        assert not was_late, f'killed at the time limit of {timeout} s; it had printed: {self.output()}'
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


def stage(folder, *command, code=0, env=None, timeout=TIME_LIMIT, processes=1, first='', input=''):
    """
    Run a stage in folder as a user does -> CompletedProcess, after asserting the exit code. processes: as many, started as torchrun
    starts them, in less time; what all print, and the first code that is not 0. first: Python that runs before the stage. input: of stdin.
    """
    ranks = [{}]
    if processes > 1:
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        ranks = [{'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1',
                  'MASTER_PORT': str(port)} for rank in range(processes)]
    started = [Started(folder, command, (env or {}) | rank, first, input) for rank in ranks]
    codes = [one.wait(timeout) for one in started]
    stdout, stderr = map(''.join, zip(*(one.output() for one in started)))
    found = next(filter(None, codes), 0)
    assert found == code, stdout + stderr
    if code == 2:
        assert stderr.count('\n') == processes and 'Traceback' not in stderr, stderr
    return subprocess.CompletedProcess(command, found, stdout, stderr)


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
