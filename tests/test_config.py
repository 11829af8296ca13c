"""The configurator: order, types, unknown names; and that no stage declares a knob that nothing reads."""
import ast
import re
import symtable

import pytest
from conftest import ROOT

from config import knobs_of

STAGES = sorted(path.name for path in ROOT.glob('*.py') if knobs_of(path))


def test_the_stages_are_found():
    assert {'prepare.py', 'train.py', 'sample.py', 'judge.py'} <= set(STAGES)


def test_files_and_flags_in_order(run, tmp_path):
    (tmp_path / 'a.py').write_text('dataset = "a"\nblock_size = 64\nlearning_rate = 1\n')
    (tmp_path / 'b.py').write_text('dataset = "b"\n')
    (tmp_path / 'rows.json').write_text('[]')
    shown = run('prepare.py', 'a.py', '--dataset=flag', 'b.py', '--source=rows.json', code=2).stdout
    assert "dataset = 'b'" in shown and 'block_size = 64' in shown
    shown = run('prepare.py', 'a.py', 'b.py', '--dataset=flag', '--source=rows.json', code=2).stdout
    assert "dataset = 'flag'  # set" in shown and 'learning_rate' not in shown


@pytest.mark.parametrize('arguments, said', [
    (['--batch_sze=4'], "--batch_sze: no knob is called 'batch_sze'; the nearest is 'batch_size'"),
    (['--batch_size=four'], "batch_size takes int, like 8, not 'four'"),
    (['--batch_size=4.0'], 'batch_size takes int'),
    (['--batch_size=True'], 'batch_size takes int'),
    (['--shuffle=0'], 'shuffle takes bool'),
    (['--learning_rate=fast'], 'learning_rate takes float'),
    (['--shuffle'], '--shuffle: flags are written --key=value'),
    (['--judge=ollama'], "no knob is called 'judge'"),  # a flag must be of the stage that runs
    (['absent.py'], 'absent.py'),
    (['typo.py'], "typo.py: no knob is called 'bacth_size'; the nearest is 'batch_size'"),
    (['wrong.py'], "wrong.py: judge_model takes str, like 'llama3', not 3"),  # a file's keys are checked for every stage
    (['broken.py'], 'broken.py'),
])
def test_mistakes_end_in_one_line(run, tmp_path, arguments, said):
    (tmp_path / 'typo.py').write_text('bacth_size = 4\n')
    (tmp_path / 'wrong.py').write_text('judge_model = 3\n')
    (tmp_path / 'broken.py').write_text('batch_size = = 4\n')
    assert said in run('train.py', *arguments, code=2).stderr


def test_values(run, prepared, tmp_path):
    # an int passes for a float, False is read as such, a string needs no quotes and keeps what it holds
    shown = run('train.py', '--learning_rate=1', '--shuffle=False', '--dataset=no "such" 1=2', code=2)
    assert 'learning_rate = 1.0' in shown.stdout and 'shuffle = False' in shown.stdout
    assert 'dataset = \'no "such" 1=2\'' in shown.stdout


@pytest.mark.parametrize('stage', STAGES)
def test_help_names_every_knob(run, stage):
    shown = run(stage, '--help').stdout
    for key, (default, comment) in knobs_of(ROOT / stage).items():
        assert re.search(rf'--{key}={re.escape(repr(default))}.*{re.escape(comment)}', shown), key
    assert f'python {stage} config/' in shown
    assert 'paths, globs, URLs' in shown or stage != 'prepare.py'  # that default takes several lines


@pytest.mark.parametrize('stage', STAGES)
def test_no_knob_is_dead(stage):
    read = globals_read((ROOT / stage).read_text())
    for key in knobs_of(ROOT / stage):
        assert key in read, f'{stage} declares {key} and never reads it'


def globals_read(source):
    """-> the names that some scope of the source reads as globals; a local of the same name does not count."""
    read, todo = set(), [symtable.symtable(source, 'stage', 'exec')]
    while todo:
        scope = todo.pop()
        todo += scope.get_children()
        is_module = scope.get_type() == 'module'
        read |= {s.get_name() for s in scope.get_symbols() if s.is_referenced() and (is_module or s.is_global())}
    return read


def test_a_dead_knob_is_seen():
    assert globals_read('a = b = c = 1\nprint(a)\ndef f(b):\n    c = 2\n    return b, c') >= {'a'}
    assert not {'b', 'c'} & globals_read('a = b = c = 1\nprint(a)\ndef f(b):\n    c = 2\n    return b, c')


def test_shared_knobs_have_equal_defaults():
    seen = {}
    for stage in STAGES:
        for key, (default, _) in knobs_of(ROOT / stage).items():
            other, value = seen.setdefault(key, (stage, default))
            assert default == value and type(default) is type(value), f'{key} differs between {other} and {stage}'


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('[!_]*.py')), ids=lambda path: path.stem)
def test_every_config_opens_with_its_command(run, path):
    assert f'config/{path.name}' in ast.get_docstring(ast.parse(path.read_text()))
    # every key is a knob of some stage: the run gets as far as the missing rows
    assert 'config' not in run('prepare.py', path, '--source=absent.json', code=2).stderr.replace(str(path), '')
