"""Fixtures: the stages run as a user runs them, in a folder of their own."""
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
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


# A process that has imported what most stages import, which takes 2.5 of the 3.5 s of a tiny run. Each line it reads, [folder, *argv], becomes a
# copy of it in which the stage runs as __main__, down to Python's own handling of what it raises; it answers with the exit code
FORKER = """
import gc, json, os, runpy, sys
import matplotlib.figure, rouge_score.rouge_scorer, sacrebleu.metrics, scipy.stats, tiktoken, torch
import torch._dynamo, torch.distributed.checkpoint.state_dict
gc.freeze()  # or each copy would touch, and so copy, all of its memory
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    os._exit(0)
folder, *sys.argv = json.loads(line)
for number, (name, mode) in enumerate([(os.devnull, os.O_RDONLY), ('stdout', os.O_WRONLY), ('stderr', os.O_WRONLY)]):
    os.dup2(os.open(name, mode), number)
os.chdir(folder)
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name='__main__')
"""
FORKED = 'train.py', 'sample.py', 'judge.py', 'export.py'


@functools.cache
def forker():
    """-> the process of FORKER, and the folder in which its copies write stdout and stderr."""
    folder = Path(tempfile.mkdtemp())
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    return subprocess.Popen([sys.executable, '-c', FORKER], cwd=folder, text=True, **pipes), folder


def fork(folder, command, timeout):
    process, output = forker()
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    for name in 'stdout', 'stderr':
        (output / name).write_text('')
    print(json.dumps([str(folder), *map(str, command)]), file=process.stdin, flush=True)
    code = int(process.stdout.readline())  # of nothing, where it took too long
    timer.cancel()
    return subprocess.CompletedProcess(command, code, (output / 'stdout').read_text(), (output / 'stderr').read_text())


def stage(folder, *command, code=0, env=None, timeout=120):
    """Run a stage (torchrun's with its own arguments before it) in folder as a user does -> CompletedProcess. Asserts the code."""
    is_forked = sys.platform == 'linux' and str(command[0]) in FORKED and not env
    command = [ROOT / arg if arg.endswith('.py') and (ROOT / arg).is_file() else arg for arg in map(str, command)]
    if is_forked:
        process = fork(folder, command, timeout)
    else:
        process = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=timeout,
                                 stdin=subprocess.DEVNULL, env=os.environ | (env or {}))
    assert process.returncode == code, process.stdout + process.stderr
    if code == 2:
        assert process.stderr.count('\n') == 1 and 'Traceback' not in process.stderr, process.stderr
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
