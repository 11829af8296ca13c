"""Fixtures: the stages run as a user runs them, in a folder of their own."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ['OMP_NUM_THREADS'] = '1'  # tests run beside each other; and another number of threads rounds otherwise
os.environ.pop('PYTHONUNBUFFERED', None)  # users seldom set it, and must see the lines of a log as they come
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

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


def stage(folder, *command, code=0, env=None, timeout=120):
    """Run a stage (torchrun's with its own arguments before it) in folder as a user does -> CompletedProcess. Asserts the code."""
    command = [sys.executable, *(ROOT / arg if arg.endswith('.py') and (ROOT / arg).is_file() else arg for arg in map(str, command))]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
                             env=os.environ | (env or {}))
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
