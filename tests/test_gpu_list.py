"""The list for a GPU, gpu.py, goes through on a CPU: all that it would run there, in tiny shapes, so that it cannot fail for silly reasons."""
import json
import os
import signal
import time

import gpu
import pytest
import torch
from conftest import NO_PICTURE, ROOT, Started, stage

TRIED = '--device=cpu', '--small=least', '--medium=least', '--steps=2', '--rows=2', '--prompts=6', '--clients=3'
# compiling takes a minute on a CPU
BEFORE = f'{NO_PICTURE}\nimport torch._dynamo\ntorch._dynamo.config.disable = True'


def run_stage(folder, *command):
    return stage(folder, ROOT / 'tests/gpu.py', 'stage', *command, first=BEFORE).stdout


def start_server(folder, *flags):
    process = Started(folder, [ROOT / 'serve.py', '--port=0', *flags], {})
    process.kill = lambda: os.kill(process.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while ': http://' not in process.output()[0]:
        assert time.monotonic() < until, process.output()
        time.sleep(0.02)
    return process.output()[0].split()[-1], process


@pytest.fixture
def run_list(tmp_path, monkeypatch):
    """run_list(flag, ...) -> (exit status, the rows of its table). Its stages start as those of all tests, which takes less time."""
    monkeypatch.setitem(gpu.SHAPES, 'least', (2, 2, 32))
    monkeypatch.setattr(gpu, 'run_stage', run_stage)
    monkeypatch.setattr(gpu, 'start_server', start_server)

    def run_list(*flags):
        status = gpu.main([*TRIED, f'--out={tmp_path}', *flags])
        rows = json.loads((tmp_path / 'gpu.json').read_text())['rows']
        assert (tmp_path / 'gpu.md').read_text().count('\n| ') == 1 + len(rows)
        return status, rows
    return run_list


@pytest.mark.parametrize('parts', ['losses,half,lora,packing', 'resume,compile,generation,serve', 'steps,speed,host'])
def test_each_part_goes_through_and_is_right(run_list, parts):
    status, rows = run_list(f'--only={parts}')
    assert status == 0 and {row[0] for row in rows} == set(parts.split(','))
    assert {row[3] for row in rows} == ({''} if 'steps' in parts else {'yes'})


def test_these_are_all_parts():
    parts = [part for mark in test_each_part_goes_through_and_is_right.pytestmark for group in mark.args[1] for part in group.split(',')]
    assert parts == list(gpu.PARTS)


def test_what_fails_is_a_line_and_the_others_go_on(run_list, monkeypatch):
    monkeypatch.setattr(gpu, 'train', lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(gpu, 'share_equal', lambda *args: 0.3)
    status, rows = run_list('--only=losses,generation')
    assert status == 1
    assert rows[0] == ['losses', 'it ended with an error', 'ZeroDivisionError: division by zero', 'NO']
    assert [row[3] for row in rows[1:]] == ['NO'] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_is_skipped_by_name(capsys):
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == 'there is no GPU that torch can use: the list for it is skipped\n'
