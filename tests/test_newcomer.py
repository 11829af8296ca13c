"""
A newcomer's first hour: the README's commands in the README's order, as they stand there, so that none of them rots.

They run in one folder, on a model of two small layers in place of the released ones; what is added to a command is in SMALLER, and nothing
is taken away. What needs a network or a package index (clone, pip, make) is checked by what it names.
"""
import os
import re
import shlex
import shutil
import signal
import subprocess
from dataclasses import asdict

from config import write_json
from model import GPT, GPTConfig

import pytest
import requests
import torch
from conftest import ROOT, Started, stage
from fake_judge import FakeJudge, honest

README = (ROOT / 'README.md').read_text(encoding='utf-8')
COMMANDS = [line.partition('#')[0].strip() for block in re.findall(r'```sh\n(.*?)```', README, re.DOTALL) for line in block.splitlines()]
PYTHON = [command for command in COMMANDS if re.match(r'(python|torchrun \S+) \w+\.py', command)]
SMALLER = {
    'prepare.py': ['--source=rows.json', '--block_size=128'],
    'train.py': ['--max_steps=2', '--eval_iters=1', '--sample_every_epoch=False'],
    'sample.py': ['--max_new_tokens=4'],
    'judge.py': ['--calibrate=2'],
    'export.py': ['--max_new_tokens=4'],
    'serve.py': ['--port=0'],
}


def write_base(path):
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128))
    torch.save(model.state_dict(), path)
    write_json(path.with_suffix('.json'), {'model': asdict(model.config)})


@pytest.fixture(scope='module')
def folder(prepared, tmp_path_factory):
    """A user's folder: the config files, rows of the user's own, and a small model."""
    folder = tmp_path_factory.mktemp('newcomer')
    shutil.copytree(ROOT / 'config', folder / 'config', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(prepared / 'rows.json', folder)
    write_base(folder / 'base.pth')
    return folder


def walk(folder, command, url):
    """Run one of the README's commands, on a smaller scale."""
    program, *arguments = shlex.split(command)
    processes = 1
    if program == 'torchrun':
        processes = int(arguments.pop(0).removeprefix('--nproc_per_node='))
    name, *given = arguments
    added = [flag for flag in SMALLER[name] if flag.split('=')[0] not in {flag.split('=')[0] for flag in given}]
    if name == 'train.py' and '--init_from=resume' not in given:
        given = [flag for flag in given if not flag.startswith('--init_from')]
        added.append('--init_from=base.pth')
    if name == 'judge.py' and '--judge=reference' not in given:
        added.append(f'--judge_url={url}')
    if name == 'serve.py':
        return visit_page(folder, [name, *given, *added])
    return stage(folder, name, *given, *added, processes=processes)


def visit_page(folder, command):
    """Open the page of serve.py, and end the server with Ctrl-C."""
    server = Started(folder, command, {})
    try:
        while 'http://' not in server.output()[0]:
            assert server.output()[1] == ''
        url = re.search(r'http://\S+', server.output()[0])[0]
        assert '<title>' in requests.get(url).text
        assert requests.get(url + '/v1/models').json()['data']
    finally:
        os.kill(server.pid, signal.SIGINT)
    server.wait()


def test_the_commands_of_the_readme(folder):
    """In their order, one after the other: each finds what those before it wrote."""
    assert len(PYTHON) > 12
    with FakeJudge(honest) as server:
        for command in PYTHON:
            for name in 'ab':  # two runs that the README compares
                if f'out/{name}' in command and not (folder / 'out' / name).exists():
                    shutil.copytree(folder / 'out/mine', folder / 'out' / name)
            walk(folder, command, server.url)
    out = folder / 'out/sft_medium'
    for name in ('ckpt.pt', 'instruction-data-with-response.json', 'scores.json', 'report.html', 'export/huggingface/config.json'):
        assert (out / name).exists(), name


def test_what_the_other_commands_name_is_there():
    names = {name for command in COMMANDS for name in re.findall(r'requirements\S*\.txt', command)}
    assert names and all((ROOT / name).exists() for name in names)
    targets = {match[1] for match in re.finditer(r'\bmake ([a-z]+)\b', README) if match[1] not in ('data', 'keeps')}
    assert {'demo', 'try', 'test', 'interop'} <= targets
    for target in targets:
        subprocess.run(['make', '--dry-run', target], cwd=ROOT, check=True, capture_output=True)
    for path in re.findall(r'\]\(([^)#:]+)\)', README):
        assert (ROOT / path).exists(), path


def test_each_python_file_at_the_top_is_in_the_readme():
    assert [path.name for path in ROOT.glob('*.py') if f'`{path.name}`' not in README] == []


def test_a_newcomer_reads_it_without_scrolling_sideways():
    lines = README.splitlines()
    assert len(lines) <= 140
    assert [line for line in lines if len(line) > 112 and not line.startswith(('|', '!['))] == []


@pytest.mark.parametrize('command, said', [
    ('sample.py', 'does not exist'),
    ('sample.py --out_dir=out/mistyped --prompt=Hi', 'does not exist'),
    ('serve.py', 'does not exist'),
    ('judge.py --judge=reference', 'write it with: python sample.py'),
    ('train.py --lr=3e-4', 'learning_rate'),
    ('train.py --bs=4', 'batch_size'),
    ('train.py config/mine.py', 'config/mine.py'),
    ('train.py --init_from=base.pth', 'prepare.py'),
    ('prepare.py --source=nothing.json', 'nothing.json'),
])
def test_a_first_mistake_is_told_with_what_to_do(tmp_path, command, said):
    write_base(tmp_path / 'base.pth')
    shown = stage(tmp_path, *command.split(), code=2)
    assert said in shown.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name not in ('base.pth', 'base.json')] == []


def test_trying_before_the_demo_says_what_to_do(tmp_path):
    shutil.copy(ROOT / 'Makefile', tmp_path)
    shown = subprocess.run(['make', 'try', '--old-file=.venv/demo'], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode and 'make demo' in shown.stdout + shown.stderr
