"""The configurator: order, types, rules, mistakes in one line; and files that are written whole or not at all."""
import ast
import errno
import io
import json
import os
import re
import subprocess
import symtable
import sys

import config
from config import (
    UserError,
    atomic_write,
    check_made_of,
    check_rule,
    configure,
    lock_folder,
    message_of,
    read_config_file,
    read_json,
    read_jsonl,
    settings_of,
    settings_of_all_stages,
    show_help,
    write_json,
)

import pytest
from conftest import ROOT

STAGES = sorted(path.name for path in ROOT.glob('*.py') if settings_of(path))
CONFIG_FILES = sorted((ROOT / 'config').glob('[!_]*.py'))

# a stage of tests: what stands above its line `config = configure(globals())`
STAGE = """
import os
rows = 8  # rows of a batch [>= 1]
rate: float = 0.5  # of learning [> 0]
share = 0.25  # of the rows [0 .. 1]
kind = 'fast'  # of the algorithm [fast | exact]
both = 2 * rows
is_on = True
os.environ['STAGE'] = 'was run'
_hidden = 7
"""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """configured(*arguments, text=...) -> (Config, the stage's globals) of a stage with these arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure sets its own
    monkeypatch.setenv('STAGE', '')

    def configured(*arguments, text=STAGE):
        path = tmp_path / 'stage.py'
        path.write_text(text + 'config = configure(globals())\n')
        monkeypatch.setattr(sys, 'argv', [str(path), *arguments])
        stage = {'__file__': str(path), '__name__': '__main__', 'configure': configure}
        exec(compile(path.read_text(), path, 'exec'), stage)
        return stage['config'], stage
    return configured


# --- values


def test_the_stages_are_found():
    assert {'prepare.py', 'train.py', 'sample.py', 'label.py', 'judge.py'} <= set(STAGES)


def test_the_later_of_files_and_flags_wins(run, tmp_path):
    (tmp_path / 'a.py').write_text('dataset = "a"\nblock_size = 64\nlearning_rate = 1\n')
    (tmp_path / 'b.py').write_text('dataset = "b"\n')
    (tmp_path / 'rows.json').write_text('[]')
    shown = run('prepare.py', 'a.py', '--dataset=flag', 'b.py', '--source=rows.json', code=2).stdout
    assert "dataset = 'b'" in shown
    assert 'block_size = 64' in shown
    shown = run('prepare.py', 'a.py', 'b.py', '--dataset=flag', '--source=rows.json', code=2).stdout
    assert "dataset = 'flag'  # set" in shown
    assert 'learning_rate' not in shown  # a setting of another stage


def test_what_may_stand_above_configure(configured):
    """An expression of other settings, an annotation, an import, an assignment to something else."""
    found, stage = configured()
    assert found == {'rows': 8, 'rate': 0.5, 'share': 0.25, 'kind': 'fast', 'both': 16, 'is_on': True}
    assert stage['_hidden'] == 7
    with pytest.raises(UserError, match='stage.py: names is a list; a setting is a bool, an int, a float or a str'):
        configured(text=STAGE + 'names = [1]\n')


def test_a_config_file_is_python(configured, tmp_path):
    """A YAML or JSON file may be Python that sets nothing."""
    for name, text in ('a.yaml', 'rows: 4\n'), ('a.json', '{"rows": 4}'):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f'{name} is not a config file, .* --source={name}'):
            configured(name)


def test_the_home_folder_is_found_where_the_shell_did_not_put_it(configured, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    found, _ = configured('--name=~/rows.json', '--other=a~/b', text="name = ''\nother = ''\n")
    assert found == {'name': '/home/me/rows.json', 'other': 'a~/b'}


def test_an_int_passes_for_a_float_and_a_string_needs_no_quotes(configured):
    found, stage = configured('--rate=1', '--is_on=False', '--kind=exact')
    assert found['rate'] == stage['rate'] == 1.0 and type(found['rate']) is float
    assert found['is_on'] is False
    assert found['kind'] == 'exact'
    # a string keeps all that it holds
    found, _ = configured('--name=no "such" 1=2', text="name = ''\n")
    assert found['name'] == 'no "such" 1=2'


def test_the_config_tells_what_was_set_by_a_flag_and_what_by_a_file(configured, tmp_path):
    (tmp_path / 'a.py').write_text('import os\nrows = 4\nbatch_size = 3\n')
    found, _ = configured('a.py', '--kind=fast')
    assert found.files == {'rows', 'batch_size'}
    assert found.flags == {'kind'}  # though it is the default


def test_a_stage_that_is_imported_keeps_its_defaults(tmp_path, monkeypatch):
    (tmp_path / 'stage.py').write_text(STAGE + 'config = configure(globals())\n')
    monkeypatch.setattr(sys, 'argv', ['pytest', '--rows=3'])
    stage = {'__file__': str(tmp_path / 'stage.py'), '__name__': 'stage', 'configure': configure}
    monkeypatch.setenv('STAGE', '')
    exec((tmp_path / 'stage.py').read_text(), stage)
    assert stage['config']['rows'] == stage['rows'] == 8


def test_a_notebook_has_a_standard_output_of_its_own(configured, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.StringIO())  # without the method reconfigure
    found, _ = configured('--rows=3')
    assert found['rows'] == 3
    assert 'rows = 3  # set' in sys.stdout.getvalue()


# --- mistakes


@pytest.mark.parametrize('arguments, said', [
    (['--rws=4'], "--rws: no setting is called 'rws'; the nearest is 'rows'"),
    (['--rows=four'], "--rows: rows takes int, like 8, not 'four'"),
    (['--rows=4.0'], 'rows takes int'),
    (['--rows=True'], 'rows takes int'),
    (['--is_on=0'], 'is_on takes bool'),
    (['--rate=fast'], 'rate takes float'),
    (['--rate=nan'], 'rate takes float'),
    (['--is_on'], '--is_on: flags are written --key=value'),
    (['--judge=ollama'], "no setting is called 'judge'"),  # a flag must be of the stage that runs
    (['absent.py'], 'config file absent.py'),
    (['typo.py'], "typo.py: no setting is called 'bacth_size'; the nearest is 'batch_size'"),
    (['wrong.py'], "wrong.py: judge_model takes str, like 'llama3', not 3"),  # though of another stage
    (['broken.py'], 'config file broken.py'),
    (['latin.py'], 'config file latin.py'),
    # the rules in brackets
    (['--rows=0'], 'rows=0 must be at least 1'),
    (['--rate=0'], 'rate=0.0 must be above 0'),
    (['--rate=1e999'], 'rate=inf must be above 0'),
    (['--share=1.5'], 'share=1.5 must be from 0 to 1'),
    (['--share=-0.1'], 'share=-0.1 must be from 0 to 1'),
    (['--kind=slow'], "kind='slow' must be one of fast, exact"),
    (['rule.py'], 'rows=0 must be at least 1'),
])
def test_a_mistake_is_told_in_one_line(configured, tmp_path, arguments, said):
    (tmp_path / 'typo.py').write_text('bacth_size = 4\n')
    (tmp_path / 'wrong.py').write_text('judge_model = 3\n')
    (tmp_path / 'broken.py').write_text('batch_size = = 4\n')
    (tmp_path / 'latin.py').write_bytes('# \xfcber'.encode('latin-1'))
    (tmp_path / 'rule.py').write_text('rows = 0\n')
    with pytest.raises(UserError) as error:
        configured(*arguments)
    assert said in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('flag, said', [
    ('--batch_sze=4', "train.py: --batch_sze: no setting is called 'batch_sze'; the nearest is 'batch_size'"),
    ('--lr=4', "the nearest is 'learning_rate'"),  # what other programs call it
    ('--learning_rate=-1', 'train.py: learning_rate=-1.0 must be above 0'),
])
def test_a_stage_ends_with_that_line_and_exit_status_2(run, flag, said):
    assert said in run('train.py', flag, code=2).stderr


def error_of(kind, *arguments, **attributes):
    error = kind(*arguments)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize('error, message, exit_code', [
    (UserError('first line\nsecond'), 'first line', 2),
    (KeyboardInterrupt(), 'interrupted', 130),
    (MemoryError(), 'out of memory; lower batch_size', 2),
    (RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory'), 'out of memory; lower batch_size', 2),
    (OSError(errno.ENOSPC, 'No space left on device', 'out/log.jsonl'), 'cannot write out/log.jsonl: No space left on device', 2),
    (OSError(errno.EDQUOT, 'Disk quota exceeded'), 'cannot write a file: Disk quota exceeded', 2),
    (NotADirectoryError(errno.ENOTDIR, 'Not a directory', 'README.md/x'), 'cannot use README.md/x: Not a directory', 2),
    (error_of(ModuleNotFoundError, "No module named 'torch'", name='torch'), 'pip install -r requirements.txt', 2),
    (error_of(ModuleNotFoundError, "No module named 'odd_name'", name='odd_name.part'), 'pip install odd-name', 2),
])
def test_what_the_user_can_mend_is_told_without_a_traceback(error, message, exit_code):
    line, code = message_of(type(error), error)
    assert message in line and '\n' not in line
    assert code == exit_code


def test_a_gpu_without_memory_is_told_too():
    import torch
    line, code = message_of(torch.OutOfMemoryError, torch.OutOfMemoryError('CUDA out of memory'))
    assert 'lower batch_size' in line and code == 2


def test_a_fault_of_the_program_keeps_its_traceback():
    assert message_of(ValueError, ValueError('x')) is None
    assert message_of(OSError, OSError(errno.EACCES, 'no')) is None


# --- what the stages declare


@pytest.mark.parametrize('stage', STAGES)
def test_help_names_every_setting_with_its_default_and_its_rule(stage, capsys):
    show_help(ROOT / stage, settings_of(ROOT / stage))
    shown = capsys.readouterr().out
    for key, (default, comment, rule) in settings_of(ROOT / stage).items():
        line = next(line for line in shown.splitlines() if line.startswith(f'  --{key}='))
        assert line.startswith(f'  --{key}={default!r}')
        assert comment in line
        assert f'[{rule}]' in line or not rule
    assert f'python {stage} ' in shown


def test_help_is_shown_and_nothing_is_run(run, tmp_path):
    shown = run('prepare.py', '--help').stdout
    assert ' paths, globs, URLs of JSON' in shown  # behind a default that takes several lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('stage', STAGES)
def test_every_default_obeys_its_rule(stage):
    for key, (default, _, rule) in settings_of(ROOT / stage).items():
        if rule:
            check_rule(key, default, rule)


@pytest.mark.parametrize('stage', STAGES)
def test_every_setting_is_read(stage):
    text = (ROOT / stage).read_text()
    read = globals_read(text) | strings(text)
    if 'find_run(config)' in text:  # sample.py's
        read |= set(re.findall(r"config\['(\w+)'\]", (ROOT / 'sample.py').read_text()))
    for key in settings_of(ROOT / stage):
        assert key in read, f'{stage} declares {key} and never reads it'


def strings(source):
    """The strings of a source, by which settings are read as in config['seed']."""
    return {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def globals_read(source):
    """The names that some scope of the source reads as globals; a local of the same name does not count."""
    read = set()
    todo = [symtable.symtable(source, 'stage', 'exec')]
    while todo:
        scope = todo.pop()
        todo += scope.get_children()
        is_module = scope.get_type() == 'module'
        read |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_referenced() and (is_module or symbol.is_global())}
    return read


def test_a_setting_that_nothing_reads_would_be_seen():
    read = globals_read('a = b = c = 1\nprint(a)\ndef f(b):\n    c = 2\n    return b, c')
    assert 'a' in read
    assert not {'b', 'c'} & read


def test_a_setting_of_several_stages_has_one_default():
    seen = {}
    for stage in STAGES:
        for key, (default, *_) in settings_of(ROOT / stage).items():
            other, value = seen.setdefault(key, (stage, default))
            assert default == value and type(default) is type(value), f'{key} differs between {other} and {stage}'


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.stem)
def test_a_config_file_opens_with_its_command_and_sets_what_some_stage_reads(path):
    assert f'config/{path.name}' in ast.get_docstring(ast.parse(path.read_text()))
    settings = settings_of_all_stages()
    for key, value in read_config_file(path, settings).items():
        if settings[key].rule:
            check_rule(key, value, settings[key].rule)


def test_a_file_that_is_no_stage_has_no_settings(tmp_path):
    (tmp_path / 'broken.py').write_text('x = = 1\nconfig = configure(globals())\n')
    (tmp_path / 'other.py').write_text('x = 1\n')
    assert settings_of(tmp_path / 'broken.py') == settings_of(tmp_path / 'other.py') == settings_of(tmp_path / 'absent.py') == {}


# --- files


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    write_json(tmp_path / 'x.json', 1)

    def fail(file):
        file.write('half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(UserError, match='No space left on device; what was there before is kept'):
        atomic_write(tmp_path / 'x.json', fail)
    assert json.loads((tmp_path / 'x.json').read_text()) == 1
    assert len(list(tmp_path.iterdir())) == 1


def ended_process():
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    (folder / f'log.json.{ended_process()}.tmp').write_text('half')  # left by a process that was killed
    lock_folder(folder)
    assert not list(folder.glob('*.tmp'))
    with pytest.raises(UserError, match='another process writes to'):
        lock_folder(folder)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write'):
        lock_folder(tmp_path / 'file' / 'out')


def test_json_is_read_with_a_byte_order_mark_and_without_numbers_that_are_none(tmp_path):
    (tmp_path / 'x.json').write_text('\ufeff[1, NaN, Infinity, 1e999, 1.5]', encoding='utf-8')
    assert read_json(tmp_path / 'x.json') == [1, None, None, None, 1.5]
    (tmp_path / 'x.json').write_text('[1, ')
    with pytest.raises(UserError, match='cannot read .*x.json'):
        read_json(tmp_path / 'x.json')


@pytest.mark.skipif(os.name != 'posix', reason='asks which processes run')
def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    """But not what a process that runs is writing, nor what belongs to another file."""
    ended = ended_process()
    kept = [f'x.json.{os.getppid()}.tmp', f'x.json.{10**30}.tmp', 'x.json.mine.tmp', f'y.json.{ended}.tmp']
    for name in [f'x.json.{ended}.tmp', *kept]:
        (tmp_path / name).write_text('half')
    write_json(tmp_path / 'x.json', 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['x.json', *kept])


def test_json_that_nests_too_deep_is_told_in_one_line(tmp_path):
    (tmp_path / 'a.json').write_text('[' * 100_000)
    with pytest.raises(UserError, match='cannot read .*a.json'):
        read_json(tmp_path / 'a.json')


def test_lines_that_an_interruption_cut_are_left_out(tmp_path):
    (tmp_path / 'x.jsonl').write_bytes(('{"a": "1\u2028", "b": NaN}\n{"a": \n\n7\n' + '[' * 100_000 + '\n{"a": 2}\n{"a"').encode())
    assert read_jsonl(tmp_path / 'x.jsonl') == [{'a': '1\u2028', 'b': None}, {'a': 2}]
    assert read_jsonl(tmp_path / 'absent') == []


def test_what_was_made_of_something_else_is_refused():
    made_of = {'weights': 'a' * 64}
    check_made_of('out/x', made_of, {'weights': 'a' * 64, 'data': 'c' * 64}, 'advice')  # what it does not tell is not compared
    with pytest.raises(UserError, match=r'out/x was made with other weights than these \(aaaaaaaa, not bbbbbbbb\); advice'):
        check_made_of('out/x', made_of, {'weights': 'b' * 64}, 'advice')


def test_the_first_process_alone_prints_the_settings(configured, capsys, monkeypatch):
    configured()
    assert 'rows = 8' in capsys.readouterr().out
    monkeypatch.setenv('RANK', '1')
    configured()
    assert capsys.readouterr().out == ''


def test_a_package_that_is_missing_names_the_file_that_installs_it():
    assert config.install_command('tiktoken') == 'pip install -r requirements.txt'
    assert os.path.exists(ROOT / 'requirements.txt')
    assert re.search('^tiktoken==', (ROOT / 'requirements.txt').read_text(), re.MULTILINE)
