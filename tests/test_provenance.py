"""
Nothing passes for what it is not: an artifact of another model, split or run is refused in one line, or put aside.

Each test is a mistake that people make, through the stages' own commands.
"""
import json
import os
import shutil

import pytest
from conftest import TINY, stage
from fake_judge import FakeJudge
from test_rows import write

AFTER = 'instruction-data-with-response.json'
BEFORE = 'instruction-data-with-response-before.json'
SCRATCH = *TINY, '--dataset=tiny', '--max_steps=3'
TUNE = tuple(flag for flag in SCRATCH if 'init_from' not in flag)


@pytest.fixture(scope='module')
def made(prepared, tmp_path_factory):
    """A folder with data/tiny, a base model in base/, and in run/, which starts from it, a run that has answered."""
    folder = tmp_path_factory.mktemp('made')
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    stage(folder, 'train.py', *SCRATCH, '--out_dir=base')
    stage(folder, 'train.py', *TUNE, '--init_from=base', '--out_dir=run')
    stage(folder, 'sample.py', '--dataset=tiny', '--out_dir=run', '--max_new_tokens=4')
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of `made`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def command(folder):
    """command(stage, *flags) in that copy, with its data set where the stage has one."""
    return lambda name, *flags, **kwargs: stage(folder, name, *(['--dataset=tiny'] if name != 'judge.py' else []), *flags, **kwargs)


def content(folder):
    """{path: bytes} of all files of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# --- a run goes where its base lies


@pytest.mark.parametrize('flags', [
    ['--init_from=base', '--out_dir=base'],
    ['--init_from=base/gpt2-2x32-sft.pth', '--out_dir=base'],
    ['--init_from=base', '--out_dir=.'],
    ['--init_from=base', '--out_dir=link'],
    ['--init_from=base', '--out_dir=base', '--lora_rank=4'],
])
def test_a_run_does_not_replace_the_model_that_it_starts_from(command, folder, flags):
    os.symlink('base', folder / 'link')
    before = content(folder)
    assert 'lies in out_dir=' in command('train.py', *TUNE, *flags, code=2).stderr
    assert content(folder) == before


# --- the rows that answer a test


def test_rows_that_the_run_may_have_learned_are_no_test(command, folder):
    """Another split of the same rows, and other rows in the same folder."""
    answers = (folder / 'run' / AFTER).read_bytes()
    ask = 'sample.py', '--out_dir=run', '--max_new_tokens=4'
    command('prepare.py', '--source=rows.json', '--block_size=128', '--split_seed=7')
    said = command(*ask, code=2).stderr
    assert 'was made with other data than these' in said
    assert 'rows of data/tiny may be among those it learned: prepare them as they were, or set --other_data=True' in said
    write(folder / 'mine.json', json.loads((folder / 'rows.json').read_text())[::-1])
    command('prepare.py', '--source=mine.json', '--block_size=128', '--overwrite=True')
    assert 'was made with other data than these' in command(*ask, code=2).stderr
    assert (folder / 'run' / AFTER).read_bytes() == answers
    # told that this is meant, it answers
    command(*ask, '--other_data=True', '--before=False')
    # and as they were prepared they are the run's own again
    command('prepare.py', '--source=rows.json', '--block_size=128', '--overwrite=True')
    command(*ask)
    assert (folder / 'run' / AFTER).read_bytes() == answers


def test_the_rows_of_another_source_are_not_replaced_unasked(command, folder):
    write(folder / 'mine.json', json.loads((folder / 'rows.json').read_text())[::-1])
    before = content(folder)
    said = command('prepare.py', '--source=mine.json', '--block_size=128', code=2).stderr
    assert 'data/tiny holds the rows of rows.json' in said
    assert content(folder) == before


@pytest.mark.parametrize('flags', [['--init_from=run'], ['--init_from=base', '--adapter=lora/adapter.safetensors']])
def test_the_rows_are_no_test_of_a_tuned_model_that_is_named_either(command, folder, flags):
    if 'base' in flags[0]:
        command('train.py', *TUNE, '--init_from=base', '--out_dir=lora', '--lora_rank=4')
    command('prepare.py', '--source=rows.json', '--block_size=128', '--split_seed=7')
    assert 'was made with other data' in command('sample.py', *flags, '--out_dir=other', '--max_new_tokens=4', code=2).stderr


def test_a_run_is_not_resumed_on_other_data(command, folder):
    command('prepare.py', '--source=rows.json', '--block_size=128', '--split_seed=7')
    said = command('train.py', *TUNE, '--init_from=resume', '--out_dir=run', '--max_steps=4', code=2).stderr
    assert 'run/ckpt.pt was made with other data than these' in said


# --- adapters and their base


def test_an_adapter_belongs_to_the_base_that_it_was_trained_on(command, folder):
    """The base is trained anew, with the same name and shape."""
    lora = 'train.py', *TUNE, '--lora_rank=4', '--out_dir=lora'
    command(*lora, '--init_from=base')
    command('train.py', *SCRATCH, '--out_dir=base', '--seed=2')
    said = command(*lora, '--init_from=resume', '--max_steps=4', code=2).stderr
    assert 'lora/ckpt.pt was made with other base weights than these' in said
    said = command('sample.py', '--init_from=base', '--adapter=lora/adapter.safetensors', '--out_dir=x', '--max_new_tokens=4', code=2).stderr
    assert 'lora/adapter.safetensors was made with other base weights than these' in said
    assert 'it fits base as that was then' in said


@pytest.mark.parametrize('change', ['renamed', 'partial'])
def test_an_adapter_whose_names_do_not_fit_does_not_answer_as_the_base(command, folder, change):
    from safetensors import safe_open
    from safetensors.torch import save_file
    command('train.py', *TUNE, '--lora_rank=4', '--out_dir=lora', '--init_from=base')
    with safe_open(folder / 'lora/adapter.safetensors', 'pt') as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}
    if change == 'renamed':
        state = {f'base_model.{name}': tensor for name, tensor in state.items()}
    else:
        state.popitem()
    save_file(state, folder / 'changed.safetensors', metadata)
    said = command('sample.py', '--init_from=base', '--adapter=changed.safetensors', '--out_dir=x', '--max_new_tokens=4', code=2).stderr
    assert 'changed.safetensors does not fit: h.' in said or 'changed.safetensors does not fit: base_model.h.' in said


def test_a_base_that_was_trained_anew_is_not_the_one_before(command, folder):
    command('train.py', *SCRATCH, '--out_dir=base', '--seed=2')
    said = command('sample.py', '--out_dir=run', '--max_new_tokens=5', code=2).stderr
    assert 'was made with other base weights than these' in said
    assert 'base is not what it was: --before=False leaves it out' in said


def test_weights_that_were_replaced_are_not_the_runs(command, folder):
    shutil.copy(folder / 'base/gpt2-2x32-sft.pth', folder / 'run/gpt2-2x32-sft.pth')
    assert 'run/gpt2-2x32-sft.pth was replaced' in command('sample.py', '--out_dir=run', code=2).stderr


def test_a_file_of_weights_alone_gets_no_guessed_heads(command, folder):
    """The number of heads cannot be seen in the weights, and a wrong one answers nonsense."""
    shutil.copy(folder / 'run/gpt2-2x32-sft.pth', folder / 'alone.pth')
    said = command('sample.py', '--init_from=alone.pth', '--out_dir=x', '--prompt=Hello', code=2).stderr
    assert 'alone.pth' in said and 'head' in said


# --- what is left of another run


def test_a_fresh_start_moves_the_earlier_run_aside(command, folder):
    """All of it, so that none of its files passes for the new run's: a LoRA run's adapter, its answers, its scores."""
    out = folder / 'out'
    fresh = 'train.py', *TUNE, '--init_from=base', '--out_dir=out'
    command(*fresh, '--lora_rank=4')
    command('sample.py', '--out_dir=out', '--max_new_tokens=4')
    command('judge.py', '--out_dir=out', '--judge=reference')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {'log.jsonl', 'ckpt.pt', 'adapter.safetensors', 'scores.json', 'report.html', AFTER, BEFORE} <= before.keys()
    shown = command(*fresh).stdout
    assert 'out held another run: it is in out/replaced-1 now' in shown
    assert {path.name: path.read_bytes() for path in (out / 'replaced-1').iterdir()} == before
    assert {path.name for path in out.iterdir()} == {'log.jsonl', 'ckpt.pt', 'gpt2-2x32-sft.pth', 'gpt2-2x32-sft.json', 'loss.png', 'replaced-1'}
    assert 'it is in out/replaced-2 now' in command(*fresh).stdout


def test_after_a_crash_the_same_command_is_no_mixture_of_two_runs(command, folder):
    """The new run ends before its first checkpoint: neither resume nor sample.py takes the earlier one for it."""
    fresh = 'train.py', *TUNE, '--init_from=base', '--out_dir=run', '--seed=2'
    command(*fresh, code=9, first="""
import os, torch
step = torch.optim.AdamW.step
torch.optim.AdamW.step = lambda *args, **kwargs: os._exit(9)
""")
    assert (folder / 'run/replaced-1/ckpt.pt').exists()
    assert (folder / 'run/log.jsonl').exists()
    assert 'cannot resume from run/ckpt.pt' in command('train.py', *TUNE, '--init_from=resume', '--out_dir=run', code=2).stderr
    assert 'run has no run' in command('sample.py', '--out_dir=run', code=2).stderr


@pytest.mark.parametrize('moment', [0, 1, 5, 99])
def test_a_kill_while_a_run_is_moved_aside_loses_nothing(command, folder, moment):
    before = {path.name: path.read_bytes() for path in (folder / 'run').iterdir()}
    fresh = 'train.py', *TUNE, '--init_from=base', '--out_dir=run'
    command(*fresh, code=-9, first=f"""
import itertools, os, pathlib
rename = pathlib.Path.rename
count = itertools.count()

def rename_or_die(path, target):
    if next(count) == {moment} or 'unfinished' in path.name and {moment} == 99:
        os.kill(os.getpid(), 9)
    return rename(path, target)

pathlib.Path.rename = rename_or_die
""")
    command(*fresh)
    assert {path.name: path.read_bytes() for path in (folder / 'run/replaced-1').iterdir()} == before


def test_answers_that_another_model_began_are_not_taken(command, folder):
    """What a killed sample.py left in the folder is taken by the same model alone."""
    first = """
import itertools, os, engine
generate = engine.generate
count = itertools.count()

def die_at_the_third(*args, on_done, **kwargs):
    def on_done_or_die(i, ids):
        if next(count) == 2:
            os._exit(9)
        on_done(i, ids)
    return generate(*args, on_done=on_done_or_die, **kwargs)

engine.generate = die_at_the_third
"""
    ask = 'sample.py', '--max_new_tokens=4', '--before=False'
    command(*ask, '--out_dir=base', code=9, first=first)
    shutil.copy(folder / 'base' / f'{AFTER.removesuffix(".json")}.part0', folder / 'run')
    assert 'are there already' not in command(*ask, '--out_dir=run').stdout
    assert '2 of 6 answers are there already' in command(*ask, '--out_dir=base').stdout


# --- scores, and what they compare


@pytest.fixture
def server():
    with FakeJudge() as server:
        yield server
        server.shutdown()


def judged(folder, server, *flags, **kwargs):
    return stage(folder, 'judge.py', '--out_dir=run', '--calibrate=0', '--judge_backoff=0.01', *flags, env={'OLLAMA_HOST': server.url}, **kwargs)


def test_what_a_judge_has_said_is_not_overwritten_by_less(folder, server):
    judged(folder, server)
    names = 'scores.json', 'scores.txt', 'report.html'
    before = [(folder / 'run' / name).read_bytes() for name in names]
    shown = judged(folder, server, '--judge=reference').stdout
    assert 'run/scores.json holds what a judge has said, and stays' in shown
    assert 'wrote run/scores-reference.json and run/report-reference.html' in shown
    assert [(folder / 'run' / name).read_bytes() for name in names] == before
    assert 'summary' not in json.loads((folder / 'run/scores-reference.json').read_text())
    # without a judge's scores there is nothing to keep
    (folder / 'run/scores.json').unlink()
    assert 'wrote run/scores.json' in judged(folder, server, '--judge=reference').stdout
    assert 'wrote run/scores.json' in judged(folder, server, '--judge=reference').stdout


def test_kept_replies_give_the_scores_while_the_server_is_off(folder, server):
    judged(folder, server)
    scores = json.loads((folder / 'run/scores.json').read_text())
    (folder / 'run/scores.json').unlink()
    server.shutdown()
    server.server_close()
    shown = judged(folder, server).stdout
    assert 'the replies that are kept are used' in shown
    assert json.loads((folder / 'run/scores.json').read_text()) == scores
    # a question that it was never asked needs it
    assert 'does not answer' in judged(folder, server, '--seed=5', code=2).stderr


def test_scores_name_what_they_were_made_of(folder, server):
    judged(folder, server)
    scores = json.loads((folder / 'run/scores.json').read_text())
    about = json.loads((folder / f'run/{AFTER.replace(".json", ".about.json")}').read_text())
    assert scores['made_of'] == about['made_of'] | {'predictions': about['sha256']}
    # what is said of another content says nothing of this one
    rows = json.loads((folder / 'run' / AFTER).read_text())
    rows[0]['model_response'] = 'changed'
    write(folder / 'run' / AFTER, rows)
    judged(folder, server)
    scores = json.loads((folder / 'run/scores.json').read_text())
    assert scores['made_of'].keys() == {'predictions'}
    assert scores['made_of']['predictions'] != about['sha256']


def test_the_answers_of_another_model_are_no_baseline(command, folder):
    """A model that answers instead of the run leaves its answers where those of the run's base are looked for."""
    compared = json.loads(judge_references(folder))
    assert compared['compared_with'] == f'run/{BEFORE}'
    command('train.py', *SCRATCH, '--out_dir=other', '--seed=2')
    command('sample.py', '--init_from=other', '--out_dir=run', '--max_new_tokens=4')
    scores = json.loads(judge_references(folder, 'is not of the model that this run started from, so nothing is compared with it'))
    assert scores['compared_with'] == ''
    # unless a flag names them
    scores = json.loads(judge_references(folder, '', f'--baseline=run/{BEFORE}'))
    assert scores['compared_with'] == f'run/{BEFORE}'


def test_the_answers_to_another_test_split_are_no_baseline(command, folder):
    """sample.py --before=False leaves the answers of before, which were to other rows."""
    command('prepare.py', '--source=rows.json', '--block_size=128', '--split_seed=7')
    command('sample.py', '--out_dir=run', '--max_new_tokens=4', '--before=False', '--other_data=True')
    scores = json.loads(judge_references(folder, 'nothing is compared with it'))
    assert scores['compared_with'] == ''


def judge_references(folder, said='', *flags):
    """The scores.json of judge.py --judge=reference."""
    assert said in stage(folder, 'judge.py', '--out_dir=run', '--judge=reference', *flags).stdout
    return (folder / 'run/scores.json').read_text()


# --- predictions, and the model that is there now


def test_answers_of_an_earlier_state_of_a_run_are_not_scored(command, folder):
    """A run that goes on leaves its answers where they are."""
    stage(folder, 'train.py', *TUNE, '--init_from=resume', '--out_dir=run', '--max_steps=5')
    said = command('judge.py', '--out_dir=run', '--judge=reference', code=2).stderr
    assert f'run/{AFTER} was made with other weights' in said and 'python sample.py' in said
    assert not (folder / 'run/scores.json').exists()
    command('sample.py', '--out_dir=run', '--max_new_tokens=4')
    command('judge.py', '--out_dir=run', '--judge=reference')


def test_answers_of_the_base_from_before_training_are_not_scored_as_the_runs(command, folder):
    (folder / 'config.py').write_text("init_from = 'base'\nout_dir = 'new'\n")
    command('sample.py', 'config.py', '--max_new_tokens=4')
    assert (folder / 'new' / AFTER).exists()
    stage(folder, 'train.py', 'config.py', *TUNE)
    assert 'was made with other weights' in command('judge.py', 'config.py', '--judge=reference', code=2).stderr


def test_labels_of_another_model_are_not_in_the_report(command, folder):
    (folder / 'unlabelled.json').write_text(json.dumps([{'instruction': 'Name it.', 'output': 'It.'}] * 3))
    label = '--label_rows=unlabelled.json', '--self_consistency=2', '--max_new_tokens=4', '--min_agreement=0.0', '--out_dir=run'
    stage(folder, 'label.py', *label)
    command('judge.py', '--out_dir=run', '--judge=reference')
    assert json.loads((folder / 'run/scores.json').read_text())['reliability']
    stage(folder, 'train.py', *TUNE, '--init_from=base', '--out_dir=other', '--seed=7')
    stage(folder, 'label.py', *label, '--init_from=other')
    command('judge.py', '--out_dir=run', '--judge=reference')
    assert not json.loads((folder / 'run/scores.json').read_text())['reliability']


def test_a_run_answers_the_test_split_of_its_own_data_set(folder):
    stage(folder, 'sample.py', '--out_dir=run', '--max_new_tokens=4', '--before=False')
    assert json.loads((folder / 'run' / AFTER).read_text())


def test_a_base_that_is_gone_is_told_with_what_to_do(command, folder):
    shutil.rmtree(folder / 'base')
    said = command('sample.py', '--out_dir=run', '--max_new_tokens=5', code=2).stderr
    assert 'base is not a checkpoint' in said and '--before=False leaves it out' in said
    command('sample.py', '--out_dir=run', '--max_new_tokens=5', '--before=False')


def test_the_loss_of_a_base_may_be_asked_for_where_it_lies(folder):
    """Nothing is written then, so that nothing is replaced."""
    before = content(folder)
    shown = stage(folder, 'train.py', *TUNE, '--init_from=base', '--out_dir=base', '--eval_only=True').stdout
    assert 'val loss' in shown and content(folder) == before


def test_labels_of_rows_with_other_names(folder):
    rows = [{'q': 'Name it.', 'a': 'It.'}, {'q': ''}]
    (folder / 'ask.json').write_text(json.dumps(rows))
    flags = '--label_rows=ask.json', '--fields=instruction:q,output:a', '--out_dir=run', '--self_consistency=2', '--max_new_tokens=2'
    assert '--skip_faulty=True' in stage(folder, 'label.py', *flags, code=2).stderr
    assert ' of 1 rows' in stage(folder, 'label.py', *flags, '--skip_faulty=True').stdout
