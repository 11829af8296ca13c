"""The loop through its own command: what it logs, saves, resumes and refuses; one process and several."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

from config import UserError, check_rule, settings_of
from model import GPT, GPTConfig, fingerprint
from prepare import data_hash, first_targets, make_batch, read_split

import numpy as np
import pytest
import torch
from conftest import NO_PICTURE, ROOT, TINY, TORCHRUN, Started
from test_load import write_safetensors
from torch.nn import functional as F

NAME = 'gpt2-2x32-sft'
FLAGS = *TINY, '--dataset=tiny', '--eval_iters=1'
interop = pytest.mark.skipif('INTEROP' not in os.environ, reason='slow: make interop')


def read_log(out):
    log = out / 'log.jsonl'
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def train(run, prepared, tmp_path, monkeypatch):
    """
    train(flag, ..., out='a', **of stage) -> the records of the run's log, after train.py ended with code. train.shown: what it printed.
    train.start(flag, ...) -> the process, which is not waited for.
    """
    shutil.copytree(prepared / 'data', tmp_path / 'data')
    monkeypatch.chdir(tmp_path)  # where read_split looks

    def train(*flags, out='a', first='', launcher=(), **kwargs):
        train.shown = run(*launcher, 'train.py', *FLAGS, f'--out_dir={out}', *flags, first=f'{NO_PICTURE}; {first}', **kwargs)
        return read_log(tmp_path / out)

    def start(*flags, out='a', first=''):
        # a shell that starts things in the background has them ignore these signals
        heard = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)'
        command = [ROOT / 'train.py', *FLAGS, f'--out_dir={out}', *flags]
        return Started(tmp_path, command, {}, f'{NO_PICTURE}; {heard}; {first}')

    train.start = start
    return train


@pytest.fixture(scope='module')
def three_steps(tmp_path_factory, prepared):
    """The folder of a run of three steps."""
    from conftest import stage
    folder = tmp_path_factory.mktemp('three')
    (folder / 'data').symlink_to(prepared / 'data')
    stage(folder, 'train.py', *FLAGS, '--out_dir=a', '--max_steps=3', first=NO_PICTURE)
    return folder / 'a'


@pytest.fixture
def begun(train, three_steps, tmp_path):
    """The folder a, in which a run of three steps has ended."""
    shutil.copytree(three_steps, tmp_path / 'a')
    return tmp_path / 'a'


def steps(records):
    """The training records without their times."""
    found = []
    for record in records:
        if 'loss' in record:
            found.append({key: value for key, value in record.items() if key != 'seconds'})
    return found


def losses(records):
    return [record['loss'] for record in steps(records)]


def evaluations(records):
    return [record for record in records if 'val_loss' in record]


def state(folder):
    return torch.load(folder / f'{NAME}.pth', weights_only=True)


def about(folder):
    return json.loads((folder / f'{NAME}.json').read_text())


def checkpoint(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


def equal_weights(a, b):
    ours = state(a)
    theirs = state(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def wait_for(process, text):
    """Until a process has printed this."""
    until = time.monotonic() + 60
    while text not in process.output()[0]:
        assert time.monotonic() < until, process.output()
        time.sleep(0.01)


def keep_rows(count, split='train'):
    """Cut a split of data/tiny to its first rows."""
    path = f'data/tiny/{split}'
    with open(f'{path}.json') as file:
        meta = json.load(file)
    n_tokens = meta['start'][count]
    for name in 'start', 'header', 'answer', 'source_of':
        meta[name] = meta[name][:count]
    with open(f'{path}.json', 'w') as file:
        json.dump(meta | {'tokens': n_tokens, 'examples': count}, file)
    os.truncate(f'{path}.bin', 2 * n_tokens)


# --- what a run computes and writes


def test_a_run_computes_what_a_plain_loop_does(train, tmp_path):
    """Each logged loss, norm and update against chapter 7's way: a row at a time, full logits, all parameters in one AdamW."""
    records = train('--max_steps=4', '--packing=False', '--eval_iters=0', '--shuffle=False')
    assert [record['step'] for record in evaluations(records)] == [0, 4]
    assert [record['step'] for record in steps(records)] == [1, 2, 3, 4]
    assert set(records[1]) == {'step', 'loss', 'lr', 'supervised_tokens', 'tokens', 'seconds', 'grad_norm'}
    data = {split: read_split('tiny', split) for split in ('train', 'val')}
    torch.manual_seed(123)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128))
    base = fingerprint(dict(model.named_parameters()))

    def total(split, numbers):
        ids, meta = data[split]
        loss = 0.0
        count = 0
        for n in numbers:
            row = torch.from_numpy(ids[meta['start'][n]:meta['end'][n]].astype(np.int64))
            first = int(meta['answer'][n] - meta['start'][n])
            loss = loss + F.cross_entropy(model(row[None])[0, first - 1:-1], row[first:], reduction='sum')
            count += len(row) - first
        return loss, count

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    loss, count = total('val', range(len(data['val'].meta['start'])))
    assert records[0]['val_loss'] == pytest.approx(loss.item() / count, rel=1e-5)
    for i, record in enumerate(steps(records)):
        loss, count = total('train', range(8 * i, 8 * i + 8))
        assert record['supervised_tokens'] == count and record['loss'] == pytest.approx(loss.item() / count, rel=1e-5)
        optimizer.zero_grad()
        (loss / count).backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.double().norm() for p in model.parameters()]))
        assert record['grad_norm'] == pytest.approx(norm.item(), rel=1e-4 if i else 1e-5)
        optimizer.step()
    for key, value in state(tmp_path / 'a').items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-3, atol=2e-5)
    # what the model was made of stands beside it
    made = about(tmp_path / 'a')
    assert made['made_of'] == {'base weights': base, 'data': data_hash('tiny')}
    assert made['weights'] == fingerprint(state(tmp_path / 'a'))
    assert made['step'] == 4 and made['val_loss'] == records[-1]['val_loss'] and made['init_from'] == 'scratch'


def test_a_run_writes_these_files_and_says_what_to_do_next(train, run, tmp_path):
    shown = run('train.py', *FLAGS, '--out_dir=a', '--max_steps=1').stdout
    assert {path.name for path in (tmp_path / 'a').iterdir()} == {'log.jsonl', 'ckpt.pt', f'{NAME}.pth', f'{NAME}.json', 'loss.png'}
    assert (tmp_path / 'a/loss.png').read_bytes().startswith(b'\x89PNG')
    last = shown.splitlines()[-3:]
    assert last[0] == 'finished step 1: all 1 steps are done'
    assert last[1].startswith(f'kept a/{NAME}.pth of step 1, val loss 10.')
    assert last[2] == 'next: python sample.py --dataset=tiny --out_dir=a'


def test_the_same_seed_gives_the_same_log_and_packing_the_same_losses(train):
    first = train('--max_steps=3', '--dropout=0.1', out='a')
    second = train('--max_steps=3', '--dropout=0.1', out='b')
    assert steps(first) == steps(second) and first[0] == second[0]
    plain = train('--max_steps=3', '--packing=False', out='c')
    packed = train('--max_steps=3', out='d')
    assert losses(plain) == pytest.approx(losses(packed), rel=1e-5)
    assert losses(first) != losses(packed)


def test_an_epoch_takes_every_row_once(train):
    records = steps(train('--epochs=2', '--sample_every_epoch=True'))
    meta = read_split('tiny', 'train').meta
    n_steps = math.ceil(meta['examples'] / 8)
    assert len(records) == 2 * n_steps
    for epoch in records[:n_steps], records[n_steps:]:
        assert sum(record['tokens'] for record in epoch) == meta['tokens']
    assert records[0]['supervised_tokens'] != records[n_steps]['supervised_tokens']  # another order
    assert train.shown.stdout.count('reference:') == 6  # three val prompts, answered at the end of each


def test_a_long_run_prints_about_a_hundred_lines_and_logs_every_step(train):
    keep_rows(2)
    records = train('--max_steps=203', '--batch_size=1', '--n_layer=1', '--n_embd=8', out='long')
    assert len(steps(records)) == 203
    printed = [line for line in train.shown.stdout.splitlines() if line.startswith('step ') and ' ms | ' in line]
    assert len(printed) == 101 and printed[-1].endswith(' min left')


def test_schedules(train):
    def rates(*flags):
        return [record['lr'] for record in steps(train('--max_steps=5', '--warmup_steps=2', *flags))]
    assert rates() == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
    assert rates('--schedule=linear', '--min_lr=1e-4') == pytest.approx([5e-4, 1e-3, 1e-3, 7e-4, 4e-4])
    cosine = [1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
    assert rates('--schedule=cosine', '--min_lr=1e-4') == pytest.approx([5e-4, 1e-3, *cosine])


def test_keep_best_and_patience(train, tmp_path):
    """A learning rate that soon overshoots: the model kept is the best one, and the run ends early, with a warning before."""
    records = train('--max_steps=60', '--learning_rate=3e-2', '--eval_interval=2', '--patience=3', '--keep_best=True', '--eval_iters=0')
    found = {record['step']: record['val_loss'] for record in evaluations(records)}
    best = min((step for step in found if step), key=found.get)
    made = about(tmp_path / 'a')
    assert made['step'] == best and made['val_loss'] == found[best] and max(found) == best + 6 < 60
    assert 'val loss has not fallen below' in train.shown.stdout
    assert f'finished step {best + 6}: val loss has not fallen in 3 evaluations\nkept a/{NAME}.pth of step {best},' in train.shown.stdout


def test_a_run_that_patience_ended_stays_ended(train, tmp_path):
    flags = '--max_steps=60', '--learning_rate=3e-2', '--eval_interval=2', '--patience=2'
    ended = train(*flags)
    before = (tmp_path / 'a/ckpt.pt').read_bytes()
    assert train(*flags, '--init_from=resume') == ended and steps(ended)[-1]['step'] < 60
    assert (tmp_path / 'a/ckpt.pt').read_bytes() == before


def test_keep_best_from_a_resume_on(train, tmp_path):
    """The best val loss so far is of a model that nobody kept: there is a .pth at the end, and it is of a later step."""
    train('--max_steps=10', '--learning_rate=3e-2', '--eval_interval=2')
    (tmp_path / 'a' / f'{NAME}.pth').unlink()
    train('--max_steps=14', '--learning_rate=3e-2', '--eval_interval=2', '--keep_best=True', '--init_from=resume')
    assert (tmp_path / 'a' / f'{NAME}.pth').exists() and about(tmp_path / 'a')['step'] > 10


def test_eval_only_prints_both_losses_and_writes_nothing(train, begun, tmp_path):
    expected = evaluations(read_log(begun))[-1]
    before = {path: path.stat().st_mtime_ns for path in begun.iterdir()}
    train('--eval_only=True', '--init_from=resume')
    said = f'step 3/7 | train loss {expected["train_loss"]:.4f} | val loss {expected["val_loss"]:.4f}'
    assert said in train.shown.stdout and ' ms | ' not in train.shown.stdout
    assert {path: path.stat().st_mtime_ns for path in begun.iterdir()} == before
    train('--eval_only=True', out='nothing')
    assert not (tmp_path / 'nothing').exists()


FAKE_WANDB = '''
import sys, types
board = types.SimpleNamespace(log=lambda fields, step: print('board', step, sorted(fields)))
sys.modules['wandb'] = types.SimpleNamespace(init=lambda **settings: print('board of', settings['name'], settings['config']['seed']) or board)
'''


def test_a_logger_is_given_the_records_too(train):
    train('--max_steps=1', '--logger=wandb', first=FAKE_WANDB)
    assert 'board of a 123' in train.shown.stdout and "board 0 ['step', 'train_loss', 'val_loss']" in train.shown.stdout
    assert "board 1 ['grad_norm', 'loss', 'lr', 'seconds', 'step', 'supervised_tokens', 'tokens']" in train.shown.stdout
    train('--logger=wandb', first="sys.modules['wandb'] = None", code=2)
    assert 'pip install wandb' in train.shown.stderr


@pytest.mark.parametrize('flags, said', [
    (['--learning_rate=5e-5', '--max_steps=1'], 'warning: learning_rate=5e-05 is for fine-tuning; from scratch 1e-3 is usual'),
    (['--learning_rate=10', '--max_steps=11'], 'in the first steps; the learning_rate may be too high')])
def test_a_learning_rate_that_can_hardly_be_right_is_warned_of(train, flags, said):
    train(*flags)
    assert said in train.shown.stdout


def test_memory_does_not_grow_with_the_rows(data, tmp_path, monkeypatch):
    """Ids stay on the disk: of 60 MB a batch copies its own rows only, and offsets take 8 bytes each."""
    ids, meta = data('train')
    repeats = 30_000_000 // len(ids)
    (tmp_path / 'data/large').mkdir(parents=True)
    np.tile(ids, repeats).astype('<u2').tofile(tmp_path / 'data/large/train.bin')
    shift = np.arange(repeats)[:, None] * len(ids)
    large = {key: value for key, value in meta.items() if key not in ('end', 'source_of')} | {'tokens': len(ids) * repeats}
    large |= {name: (shift + meta[name]).ravel().tolist() for name in ('start', 'header', 'answer')}
    (tmp_path / 'data/large/train.json').write_text(json.dumps(large))
    monkeypatch.chdir(tmp_path)
    large_data = read_split('large', 'train')
    n = meta['examples'] * repeats
    assert large_data.ids.nbytes > 59e6 and first_targets(large_data.meta, 'response').nbytes == 8 * n
    tracemalloc.start()
    batch = make_batch(large_data, [0, n // 2, n - 1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 and batch[0].shape[0] == 1


# --- a run that stops, and goes on


@pytest.mark.parametrize('extra', [(), ('--lora_rank=4', '--lora_dropout=0.1'), ('--sampled_softmax=64',)])
def test_resume_is_bit_for_bit(train, tmp_path, extra):
    flags = '--dropout=0.1', '--schedule=linear', '--warmup_steps=2', '--max_steps=9', *extra
    whole = train(*flags, '--save_interval=9', out='a')
    saved = checkpoint(tmp_path / 'a')
    assert saved['progress']['step'] == 9 and not any('_orig_mod' in key or 'module.' in key for key in saved['model'])
    # killed after its checkpoint of step 5, in the first epoch: what it logged behind that is made anew
    process = train.start(*flags, '--save_interval=5', '--eval_interval=1', out='c')
    process.signal_when(lambda: '\nstep 7/' in process.output()[0], signal.SIGKILL)
    assert checkpoint(tmp_path / 'c')['progress']['step'] == 5
    resumed = train(*flags, '--init_from=resume', out='c')
    assert steps(resumed) == steps(whole)
    assert equal_weights(tmp_path / 'a', tmp_path / 'c')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_with_all_saved(train, tmp_path, number):
    """Ctrl-C, a scheduler's, and a lost terminal's."""
    process = train.start('--max_steps=99', out='b')
    process.signal_when(lambda: '\nstep 3/' in process.output()[0], number)
    stdout, stderr = process.output()
    assert process.returncode == 0 and not stderr
    step = checkpoint(tmp_path / 'b')['progress']['step']
    assert 3 <= step < 99 and f'stopped at step {step}: a signal came ({number.name})' in stdout
    # behind a config file, which may set init_from as well
    command = re.search('next: python (train.py .*)', stdout)[1]
    assert command.startswith(f'train.py {" ".join(FLAGS[1:])}') and command.endswith(' --init_from=resume')
    assert about(tmp_path / 'b')['step'] == step
    if number == signal.SIGINT:
        resumed = train(f'--max_steps={step + 2}', '--init_from=resume', out='b')
        assert steps(resumed) == steps(train(f'--max_steps={step + 2}', out='whole'))


# counts the batches that are made, and gets a signal with one of them
COUNT_BATCHES = '''
import atexit, os, signal, prepare
calls = []
real = prepare.make_batch
def make_batch(*args, **kwargs):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **kwargs)
prepare.make_batch = make_batch
atexit.register(lambda: print(len(calls), 'batches'))
'''


def test_an_evaluation_can_be_left(train, tmp_path):
    """A signal is heard before the next batch; the evaluation is made up for by the run that resumes."""
    flags = '--eval_interval=2', '--eval_iters=0', '--batch_size=4', '--max_steps=4'
    whole = train(*flags, out='whole')
    # an evaluation has 14 batches of train and two of val: the signal comes within that of step 2
    train(*flags, first=COUNT_BATCHES.format(at=16 + 2 + 5))
    assert '\n23 batches' in train.shown.stdout
    assert 'stopped at step 2: a signal came (SIGTERM)' in train.shown.stdout
    assert evaluations(read_log(tmp_path / 'a')) == evaluations(whole)[:1]
    assert checkpoint(tmp_path / 'a')['progress']['step'] == 2
    resumed = train(*flags, '--init_from=resume')
    assert evaluations(resumed) == evaluations(whole) and steps(resumed) == steps(whole)


def test_a_run_that_is_stopped_before_its_first_step_goes_on_and_has_a_model_that_answers(train, run, tmp_path):
    whole = train('--max_steps=2', out='whole')
    train('--max_steps=2', first=COUNT_BATCHES.format(at=1))
    assert 'stopped at step 0' in train.shown.stdout
    assert '--init_from=resume' in train.shown.stdout.splitlines()[-2]
    run('sample.py', '--out_dir=a', '--prompt=x', '--max_new_tokens=2')
    assert steps(train('--max_steps=2', '--init_from=resume')) == steps(whole)


def test_a_run_that_diverges_before_its_first_checkpoint_is_told_to_start_again(train, tmp_path):
    train('--max_steps=9', '--learning_rate=1e9', '--warmup_steps=0', code=2)
    assert 'Start again with a lower learning_rate' in train.shown.stderr
    assert not (tmp_path / 'a/ckpt.pt').exists()


def test_what_is_missing_ends_a_run_before_an_earlier_one_is_moved(train, begun):
    train('--max_steps=9', '--logger=wandb', first='import sys; sys.modules["wandb"] = None', code=2)
    assert 'pip install wandb' in train.shown.stderr
    assert (begun / 'ckpt.pt').exists() and not list(begun.glob('replaced-*'))


def test_a_signal_that_is_passed_on_is_no_second_one(train, tmp_path):
    """At Ctrl-C the program timeout sends its child the signal that the terminal has sent to both."""
    process = train.start('--max_steps=99', out='b')
    wait_for(process, '\nstep 3/')
    os.kill(process.pid, signal.SIGINT)
    process.signal_when(lambda: True, signal.SIGINT)
    assert process.returncode == 0 and 'a signal came (SIGINT)' in process.output()[0]
    assert checkpoint(tmp_path / 'b')['progress']['step'] >= 3


@pytest.mark.parametrize('number', [signal.SIGINT, None])
def test_a_run_whose_output_nobody_reads_any_more_is_saved(tmp_path, prepared, number):
    """At Ctrl-C `python train.py ... 2>&1 | tee log` loses tee first; `| head` goes away alone."""
    shutil.copytree(prepared / 'data', tmp_path / 'data')
    command = [sys.executable, ROOT / 'train.py', *FLAGS, '--max_steps=30', '--out_dir=b', '--save_interval=1000']
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith('step 3/'):
                break
        process.stdout.close()
        if number:
            process.send_signal(number)
        assert process.wait(timeout=60) == 0
    step = checkpoint(tmp_path / 'b')['progress']['step']
    assert 3 <= step < 30 if number else step == 30
    assert about(tmp_path / 'b')['step'] == step


def test_a_second_signal_ends_at_once(train):
    wait = 'import engine, time; engine.generate = lambda *args, **kwargs: print("waiting", flush=True) or time.sleep(60)'
    process = train.start('--epochs=2', '--sample_every_epoch=True', first=wait)
    wait_for(process, 'waiting')
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    began = time.monotonic()
    process.signal_when(lambda: True, signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM and time.monotonic() - began < 10


def test_a_checkpoint_is_written_every_so_many_minutes(train, tmp_path):
    process = train.start('--max_steps=60', '--save_minutes=1e-6', '--save_interval=1000', out='b')
    process.signal_when(lambda: '\nstep 5/' in process.output()[0], signal.SIGKILL)
    assert checkpoint(tmp_path / 'b')['progress']['step'] >= 4


def test_the_checkpoint_comes_before_the_samples(train, tmp_path):
    """What fails there, such as broken weights, does not cost the epoch."""
    train('--epochs=1', '--sample_every_epoch=True', first='import engine; engine.generate = lambda *args, **kwargs: 1 / 0', code=1)
    assert 'ZeroDivisionError' in train.shown.stderr
    assert checkpoint(tmp_path / 'a')['progress']['step'] == 7


def test_resume_refuses_another_run(train, begun):
    meta = json.loads((begun / '../data/tiny/train.json').read_text())
    train('--init_from=resume', '--n_embd=64', '--dropout=0.5', '--loss_on=all', '--lora_rank=2', '--batch_size=2', code=2)
    for said in ('n_embd was 32, is 64', 'dropout was 0.0, is 0.5', "loss_on was 'response', is 'all'", 'lora_rank was 0, is 2',
                 'examples_per_step was 8, is 2'):
        assert said in train.shown.stderr
    train('--init_from=resume', out='nothing', code=2)
    assert 'nothing/ckpt.pt' in train.shown.stderr
    # the same rows, split otherwise: what was trained on may now be in val
    keep_rows(meta['examples'] - 1)
    train('--init_from=resume', code=2)
    assert 'a/ckpt.pt was made with other data than these' in train.shown.stderr
    (begun / 'ckpt.pt').write_bytes((begun / 'ckpt.pt').read_bytes()[:1000])
    train('--init_from=resume', code=2)
    assert 'cannot resume from a/ckpt.pt' in train.shown.stderr


def test_settings_of_the_optimizer_may_change_on_resume_and_are_printed(train, begun):
    """The advice for a run that diverged is a lower learning_rate, or grad_clip."""
    whole = train('--max_steps=5', out='whole')
    records = train('--max_steps=5', '--init_from=resume', '--learning_rate=2e-3', '--grad_clip=0.5', '--beta1=0.5', '--weight_decay=0.0')
    for said in 'learning_rate: 0.001 is 0.002', 'grad_clip: 0.0 is 0.5', 'beta1: 0.9 is 0.5', 'weight_decay: 0.1 is 0.0':
        assert f'resumed with another {said} from here on' in train.shown.stdout
    assert [record['lr'] for record in steps(records)] == [1e-3] * 3 + [2e-3] * 2
    assert losses(records)[:4] == losses(whole)[:4] and losses(records)[4] != losses(whole)[4]


def test_resume_with_micro_batches_cut_otherwise(train, begun):
    """The same examples per step may be cut into other micro-batches; another number of them is another run."""
    whole = train('--max_steps=4', out='whole')
    train('--max_steps=4', '--batch_size=4', '--gradient_accumulation_steps=4', '--init_from=resume', code=2)
    assert 'examples_per_step was 8, is 16' in train.shown.stderr
    resumed = train('--max_steps=4', '--batch_size=2', '--gradient_accumulation_steps=4', '--init_from=resume')
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


def test_resume_after_a_crash_cut_the_log(train, begun):
    with open(begun / 'log.jsonl', 'a') as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 3, "lo')
    records = train('--max_steps=5', '--init_from=resume')
    assert [record['step'] for record in steps(records)] == [1, 2, 3, 4, 5]


def to_format_1(folder):
    """Write ckpt.pt as format 1: settings and progress have other names, and it does not name what it was made of, but for its rows."""
    saved = checkpoint(folder)
    config = {key: value for key, value in saved['config'].items()
              if key not in ('sampled_softmax', 'save_minutes', 'eval_only', 'logger', 'download_from', 'decay_params')}
    config |= {'loss_on': 'answer', 'decay': 'all', 'weights': 'openai', 'init': 'gpt2'}
    progress = dict(zip(('step', 'seen', 'best', 'waited', 'val_loss', 'evaluated'), saved['progress'].values()))
    names = list(saved['model'])
    groups = [{'params': names, 'lr': 1e-3, 'betas': (0.9, 0.999), 'eps': 1e-8, 'weight_decay': 0.1, 'fused': True}]
    meta = read_split('tiny', 'train').meta
    split = {f'data_{key}': meta[key] for key in ('split_seed', 'examples', 'tokens')}
    torch.save({
        'model': saved['model'], 'optimizer': saved['optimizer'] | {'param_groups': groups}, 'scaler': {}, 'progress': progress, 'config': config,
        'sha256': meta['sha256'], 'model_config': saved['model_config'], 'examples_per_step': saved['examples_per_step'], 'split': split},
        folder / 'ckpt.pt')


def test_checkpoints_of_format_1_go_on(train, begun, tmp_path):
    whole = train('--max_steps=5', out='whole')
    to_format_1(begun)
    resumed = train('--max_steps=5', '--init_from=resume')
    assert steps(resumed) == steps(whole)
    assert equal_weights(begun, tmp_path / 'whole')


def test_checkpoints_of_format_1_do_not_go_on_with_other_rows(train, begun):
    to_format_1(begun)
    keep_rows(50)
    train('--max_steps=5', '--init_from=resume', code=2)


# prints the memory that the stage took beyond what it had at its start, in kB, and whether the checkpoint is still mapped
MEASURE = '''
import atexit, re
def memory(key):
    return int(re.search(rf'{key}:\\s*(\\d+) kB', open('/proc/self/status').read())[1])
before = memory('VmRSS')
atexit.register(lambda: print('\\npeak', memory('VmHWM') - before, 'ckpt.pt' in open('/proc/self/maps').read()))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_resume_takes_no_more_memory_than_the_run(train):
    """And keeps no file mapped on a CPU: on Windows it could not be replaced then."""
    flags = '--n_embd=256', '--batch_size=2', '--save_interval=1000'
    peaks = []
    for more in ('--max_steps=3',), ('--max_steps=6', '--init_from=resume'):
        train(*flags, *more, first=MEASURE)
        peak, is_mapped = train.shown.stdout.rpartition('\npeak ')[2].split()
        peaks.append(int(peak))
        assert is_mapped == 'False'
    # weights, two moments, and the gradients of the embedding
    assert peaks[0] > 4 * 4 * 50257 * 256 / 1024
    assert peaks[1] <= 1.1 * peaks[0], peaks


# --- what fails


def test_a_run_that_diverges_keeps_its_checkpoint(train, begun):
    saved = checkpoint(begun)
    saved['model']['wte.weight'][:] = float('nan')
    torch.save(saved, begun / 'ckpt.pt')
    before = (begun / 'ckpt.pt').read_bytes()
    train('--max_steps=9', '--init_from=resume', '--save_interval=1', code=2)
    assert 'step 4 has loss nan' in train.shown.stderr and 'Resume it with a lower learning_rate' in train.shown.stderr
    assert (begun / 'ckpt.pt').read_bytes() == before


def test_a_full_disk_keeps_the_last_checkpoint(train, begun):
    before = (begun / 'ckpt.pt').read_bytes()
    limit = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, {len(before) // 2}))'
    train('--max_steps=4', '--init_from=resume', code=2, first=limit)
    assert 'cannot write a/ckpt.pt' in train.shown.stderr and (begun / 'ckpt.pt').read_bytes() == before
    assert not list(begun.glob('*.tmp'))


FULL_LOG = '''
import builtins
real = builtins.open
def open(path, mode='r', *args, **kwargs):
    if str(path).endswith('log.jsonl') and mode == 'a':
        path = '/dev/full'
    return real(path, mode, *args, **kwargs)
builtins.open = open
'''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_ends_the_log_in_one_line(train, begun):
    before = (begun / 'ckpt.pt').read_bytes()
    train('--max_steps=9', '--init_from=resume', first=FULL_LOG, code=2)
    assert 'No space left on device' in train.shown.stderr and (begun / 'ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('allocate', [
    'torch.empty(1 << 50)', 'bytearray(1 << 60)', "(_ for _ in ()).throw(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\\nMore'))"],
    ids=['torch on a CPU', 'Python', 'torch on a GPU'])
def test_out_of_memory_is_one_line_that_says_what_to_lower(train, allocate):
    train(first=f'import torch; import model; model.GPT.forward = lambda *args, **kwargs: {allocate}', code=2)
    assert 'out of memory; lower batch_size' in train.shown.stderr and 'lora_rank' in train.shown.stderr


def test_rows_without_a_target_are_refused(train, tmp_path):
    meta = json.loads((tmp_path / 'data/tiny/train.json').read_text())
    meta['answer'][3] = meta['start'][4]
    (tmp_path / 'data/tiny/train.json').write_text(json.dumps(meta))
    train('--max_steps=2', code=2)
    assert 'no token to learn' in train.shown.stderr


@pytest.mark.parametrize('flags, said', [
    (['--dataset=absent'], 'run: python prepare.py'),
    (['--block_size=32'], 'prepare the data again with --block_size=32'),
    (['--grad_clip=-1'], 'grad_clip=-1.0 must be at least 0'),
    (['--n_head=3'], 'n_embd=32 must be a multiple of n_head=3'),
    (['--loss_on=prompt'], "loss_on='prompt' must be one of response, response+header, all"),
    (['--device=cuda:99'], "device='cuda:99' must be one of auto, cpu, cuda, mps"),
    (['--init_from=absent/model'], 'absent/model'),
    (['--quantize=nf4'], 'it needs --lora_rank=16'),
    (['--lora_rank=4', '--lora_targets=wte'], 'lora_targets'),
])
def test_mistakes_end_in_one_line(train, flags, said):
    train(*flags, code=2)
    assert said in train.shown.stderr


def test_every_number_has_bounds():
    settings = settings_of(ROOT / 'train.py')
    free = {key for key, setting in settings.items() if type(setting.default) in (int, float) and not setting.rule}
    assert free == {'seed'}
    wrong = {'learning_rate': (0.0, -1.0, math.inf), 'beta1': (1.0, -0.1), 'beta2': (1.0,), 'weight_decay': (-0.1,), 'dropout': (1.0, -0.1),
             'grad_clip': (-1.0, math.inf), 'lora_rank': (-1,), 'lora_alpha': (0.0,), 'lora_dropout': (1.0,), 'warmup_steps': (-1,), 'min_lr': (-1.0,),
             'save_interval': (-1,), 'save_minutes': (0.0,), 'patience': (-1,), 'batch_size': (0,), 'gradient_accumulation_steps': (0,), 'epochs': (0,),
             'max_steps': (-1,), 'eval_interval': (0,), 'eval_iters': (-1,), 'n_layer': (0,), 'n_head': (0,), 'n_embd': (0,), 'block_size': (1,),
             'sampled_softmax': (-1,)}
    numbers = {key for key, setting in settings.items() if type(setting.default) in (int, float)}
    assert wrong.keys() == numbers - {'seed'}
    for key, values in wrong.items():
        check_rule(key, settings[key].default, settings[key].rule)
        for value in values:
            with pytest.raises(UserError, match=f'{key}={value} must be'):
                check_rule(key, value, settings[key].rule)


# --- what is in the folder already, and what a run starts from


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_a_fresh_start_moves_another_runs_files_aside(train, begun):
    (begun / 'scores.json').write_text('{}')
    (begun / 'notes.txt').write_text('mine')
    weights = (begun / f'{NAME}.pth').read_bytes()
    train('--max_steps=1', '--seed=7')
    assert 'a held another run: it is in a/replaced-1 now' in train.shown.stdout
    assert names_in(begun / 'replaced-1') == {'log.jsonl', 'ckpt.pt', f'{NAME}.pth', f'{NAME}.json', 'scores.json'}
    assert (begun / 'replaced-1' / f'{NAME}.pth').read_bytes() == weights
    assert names_in(begun) == {'log.jsonl', 'ckpt.pt', f'{NAME}.pth', f'{NAME}.json', 'notes.txt', 'replaced-1'}
    assert about(begun)['step'] == 1
    # a crash before the first checkpoint leaves a log alone, which goes the same way
    (begun / 'ckpt.pt').unlink()
    (begun / f'{NAME}.pth').unlink()
    train('--max_steps=1')
    assert names_in(begun / 'replaced-2') == {'log.jsonl', f'{NAME}.json'}
    # what was moved goes on as it is
    train('--max_steps=4', '--init_from=resume', out='a/replaced-1')
    assert about(begun / 'replaced-1')['step'] == 4


KILLED_WHILE_MOVING = '''
import os, pathlib
moved = []
real = pathlib.Path.rename
def rename(path, target):
    moved.append(path)
    if len(moved) == {at}:
        os._exit(9)
    return real(path, target)
pathlib.Path.rename = rename
'''


@pytest.mark.parametrize('at', [2, 5])
def test_a_kill_in_the_middle_of_moving_does_no_harm(train, begun, at):
    """The next start moves the rest. The fifth to be renamed is the folder itself, which holds all by then."""
    train('--max_steps=1', first=KILLED_WHILE_MOVING.format(at=at), code=9)
    train('--max_steps=1')
    assert names_in(begun / 'replaced-1') == {'log.jsonl', 'ckpt.pt', f'{NAME}.pth', f'{NAME}.json'}
    assert names_in(begun) == {'log.jsonl', 'ckpt.pt', f'{NAME}.pth', f'{NAME}.json', 'replaced-1'}
    assert checkpoint(begun / 'replaced-1')['progress']['step'] == 3 and checkpoint(begun)['progress']['step'] == 1


def test_a_folder_that_was_removed_leaves_its_number_free(train, begun):
    (begun / 'replaced-2').mkdir()
    (begun / 'replaced-2/ckpt.pt').write_text('of a second run; the first is removed')
    train('--max_steps=1')
    assert (begun / 'replaced-2/ckpt.pt').read_text() == 'of a second run; the first is removed'


@pytest.mark.parametrize('init_from', ['a', f'a/{NAME}.pth', '../link/ckpt.pt'])
def test_a_start_from_the_folder_that_would_be_replaced_is_refused(train, begun, init_from):
    (begun / '../../link').unlink(missing_ok=True)
    (begun / '../../link').symlink_to(begun)
    before = names_in(begun)
    train(f'--init_from={init_from}', code=2)
    assert f'init_from={init_from} lies in out_dir=a, where this run would replace it' in train.shown.stderr
    assert names_in(begun) == before
    if init_from == 'a':
        train('--init_from=a', '--max_steps=1', out='b')
        assert about(begun / '../b')['init_from'] == 'a'


def test_two_runs_in_one_folder_are_refused(train, tmp_path):
    train('--max_steps=1', out='b')
    process = train.start('--max_steps=9999', '--save_interval=9999')  # it writes no checkpoint in the meantime
    try:
        wait_for(process, '\nstep 0/')
        for init_from in 'scratch', 'resume':
            shutil.copy(tmp_path / 'b/ckpt.pt', tmp_path / 'a/ckpt.pt')
            train('--max_steps=1', f'--init_from={init_from}', code=2)
            assert 'another process writes to a: wait for it, or name another folder' in train.shown.stderr
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_the_adapter_is_written_before_the_merged_model(train, tmp_path):
    """Merging takes the most memory of a run of LoRA: what fails there does not cost what was trained."""
    first = 'import lora; lora.LoRA.merged_weight = lambda self: 1 / 0'
    train('--lora_rank=4', '--max_steps=1', first=first, code=1)
    assert (tmp_path / 'a/adapter.safetensors').exists() and (tmp_path / 'a/ckpt.pt').exists()
    train('--lora_rank=4', '--max_steps=1', '--init_from=resume')
    assert state(tmp_path / 'a').keys() == GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128)).state_dict().keys()


def test_lora_does_not_go_on_upon_a_base_that_was_trained_anew(train, begun, tmp_path):
    begun.rename(tmp_path / 'base')
    lora = '--lora_rank=2', '--learning_rate=1e-2'
    train('--init_from=base', *lora, '--max_steps=2', out='lora')
    train('--init_from=resume', *lora, '--max_steps=3', out='lora')
    made = about(tmp_path / 'lora')
    assert made['init_from'] == 'base' and made['made_of']['base weights'] == about(tmp_path / 'base')['weights']
    train('--seed=7', '--max_steps=1', out='base')
    train('--init_from=resume', *lora, '--max_steps=4', out='lora', code=2)
    assert 'lora/ckpt.pt was made with other base weights than these' in train.shown.stderr


def test_a_vocabulary_with_added_and_padded_ids_trains_and_answers(train, tmp_path):
    """50,304 of them, as nanoGPT pads it; the model says one that the tokenizer lacks."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    model.ln_f.bias.data = 5 * torch.randn(32).sign()
    model.wte.weight.data[50257:] = model.ln_f.bias.data / 5
    write_safetensors(tmp_path, model)
    train(f'--init_from={tmp_path}/model.safetensors', '--epochs=1', '--sample_every_epoch=True', '--learning_rate=1e-7')
    assert train.shown.stdout.count('answer:') == 3
    assert state(tmp_path / 'a')['wte.weight'].shape == (50257, 32)


# --- sampled softmax


@pytest.mark.parametrize('processes', [1, 2])
def test_sampled_softmax_moves_the_vectors_of_the_rows_tokens_alone(train, tmp_path, processes):
    train('--sampled_softmax=200', '--weight_decay=0.0', processes=processes)  # an epoch
    torch.manual_seed(123)
    before = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128)).wte.weight
    moved = (state(tmp_path / 'a')['wte.weight'] != before).any(dim=1)
    seen = np.unique(read_split('tiny', 'train').ids)
    assert moved.nonzero()[:, 0].tolist() == seen.tolist()


def test_sampled_softmax_is_the_softmax_of_a_smaller_vocabulary(train):
    """Of the whole one, if so many are drawn; else the loss is lower. An evaluation has all tokens."""
    whole = train('--max_steps=2', out='whole')
    drawn = train('--max_steps=2', '--sampled_softmax=60_000', out='drawn')
    assert losses(drawn)[0] == pytest.approx(losses(whole)[0], rel=1e-6)
    assert steps(drawn)[0]['grad_norm'] == pytest.approx(steps(whole)[0]['grad_norm'], rel=0.01)
    some = train('--max_steps=2', '--sampled_softmax=1000', out='some')
    assert evaluations(drawn)[0] == evaluations(some)[0] == evaluations(whole)[0]
    assert losses(some)[0] < losses(whole)[0] - 1


# --- several processes


def test_accumulation_and_processes_are_one_step(train, tmp_path):
    """8x1, 2x4, 2x2x2 processes, 4x2 processes sharded: the same losses, norms and weights."""
    flags = '--max_steps=4', '--grad_clip=0.5', '--decay_params=matrices', '--eval_interval=4', '--eval_iters=0'
    whole = train(*flags, '--batch_size=8', out='whole')
    for out, extra, processes in (('accumulated', ('--batch_size=2', '--gradient_accumulation_steps=4'), 1),
                                  ('processes', ('--batch_size=2', '--gradient_accumulation_steps=2'), 2),
                                  ('sharded', ('--batch_size=4', '--shard=True'), 2)):
        other = train(*flags, *extra, out=out, processes=processes)
        assert len(whole) == len(other)
        for a, b in zip(whole, other):
            for key in a.keys() - {'seconds'}:
                assert a[key] == pytest.approx(b[key], rel=2e-4 if key == 'grad_norm' else 1e-5), (out, key)
        expected = state(tmp_path / 'whole')
        found = state(tmp_path / out)
        assert list(expected) == list(found)
        for key in expected:
            torch.testing.assert_close(expected[key], found[key], rtol=1e-3, atol=1e-4)


def test_a_process_without_examples_takes_part_in_the_step(train):
    """Five rows, four a step: the last step has a single one, and so has the last batch of an evaluation."""
    keep_rows(5)
    keep_rows(3, 'val')
    flags = '--epochs=1', '--eval_iters=0'
    whole = train(*flags, '--batch_size=4', out='whole')
    two = train(*flags, '--batch_size=2', out='two', processes=2)
    assert [record['supervised_tokens'] for record in steps(two)] == [record['supervised_tokens'] for record in steps(whole)]
    assert losses(two) == pytest.approx(losses(whole), rel=1e-5) and len(losses(two)) == 2
    for a, b in zip(evaluations(two), evaluations(whole)):
        assert a == pytest.approx(b, rel=1e-5)


def test_resume_with_another_number_of_processes(train, begun):
    whole = train('--max_steps=6', '--batch_size=4', '--gradient_accumulation_steps=2', out='whole')
    sharded = train('--max_steps=5', '--batch_size=4', '--shard=True', '--init_from=resume', processes=2)
    assert losses(sharded) == pytest.approx(losses(whole)[:5], rel=1e-5)
    resumed = train('--max_steps=6', '--init_from=resume')
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize('flags, said', [
    (('--sampled_softmax=9',), 'sampled_softmax goes with one process or several, not with shard=True'),
    (('--quantize=nf4', '--lora_rank=4'), "quantize='nf4' freezes the matrices: it needs --lora_rank=16, and no --shard")])
def test_what_cannot_be_sharded_is_refused(train, flags, said):
    train('--shard=True', *flags, processes=2, code=2)
    assert train.shown.stderr.count(said) == 2


# at each backward: the bytes of the half-precision tensors that it will need and that have the shape of a block's matrix
SAVED_MATRICES = '''
import torch
kept = []
shapes = [(96, 32), (32, 32), (128, 32), (32, 128)]
shapes += [shape[::-1] for shape in shapes]
def pack(tensor):
    if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes:
        kept.append(tensor.untyped_storage())
    return tensor
hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
hooks.__enter__()
real = torch.Tensor.backward
def backward(self, *args, **kwargs):
    print('saved', len(kept), sum({storage._cdata: storage.nbytes() for storage in kept}.values()))
    kept.clear()
    return real(self, *args, **kwargs)
torch.Tensor.backward = backward
'''


def test_no_process_keeps_half_precision_copies_of_all_matrices(train):
    """Sharded, a block's matrices are gathered in half precision and freed again; under autocast alone each is kept until backward."""
    def bytes_saved(*flags, **kwargs):
        train('--max_steps=1', '--dtype=bfloat16', '--batch_size=4', *flags, first=SAVED_MATRICES, **kwargs)
        found = [line.split()[1:] for line in train.shown.stdout.splitlines() if line.startswith('saved')]
        assert found and all(int(count) >= 8 for count, _ in found)
        return max(int(size) for _, size in found)
    matrices = 2 * 2 * 12 * 32 ** 2
    assert bytes_saved(out='whole') >= matrices
    assert bytes_saved('--shard=True', out='sharded', processes=2) == 0


@interop
def test_processes_tell_a_mistake_too(run):
    """torch's own handling of exceptions in several processes must not swallow the line."""
    shown = run(*TORCHRUN, 'train.py', *TINY, '--dataset=absent', code=1).stderr
    assert 'train.py: there is no data/absent/train.json' in shown


# --- precision and terminals


def test_bfloat16(train, three_steps, tmp_path):
    half = train('--max_steps=3', '--dtype=bfloat16')
    assert losses(half) == pytest.approx(losses(read_log(three_steps)), rel=2e-3)
    assert all(value.dtype == torch.float32 for value in state(tmp_path / 'a').values())


FEW = '--batch_size=4', '--dtype=float16'  # which is slow on a CPU


def test_float16(train, tmp_path):
    """With its GradScaler: the losses are fp32's but for rounding, a resumed run is bit for bit the unbroken one."""
    plain = train('--max_steps=3', '--batch_size=4', out='a')
    half = train('--max_steps=3', *FEW, out='b')
    assert losses(half) == pytest.approx(losses(plain), rel=5e-3)
    assert [record['grad_norm'] for record in steps(half)] == pytest.approx([record['grad_norm'] for record in steps(plain)], rel=5e-2)
    assert {record['loss_scale'] for record in steps(half)} == {65536.0} and 'loss_scale' not in steps(plain)[0]
    assert all(value.dtype == torch.float32 for value in state(tmp_path / 'b').values())
    train('--max_steps=2', *FEW, out='c')
    resumed = train('--max_steps=3', *FEW, '--init_from=resume', out='c')
    assert steps(resumed) == steps(half)
    assert equal_weights(tmp_path / 'b', tmp_path / 'c')


def test_float16_skips_a_step_that_overflows(train, tmp_path):
    """The scaler's state is in the checkpoint: with one that is far too large, steps are skipped and it is halved."""
    train('--max_steps=1', *FEW)
    before = state(tmp_path / 'a')
    saved = checkpoint(tmp_path / 'a')
    saved['scaler']['scale'] = 2.0 ** 24
    torch.save(saved, tmp_path / 'a/ckpt.pt')
    records = steps(train('--max_steps=2', *FEW, '--init_from=resume'))
    assert records[-1]['grad_norm'] is None and records[-1]['loss_scale'] == 2.0 ** 23
    assert all(torch.equal(value, state(tmp_path / 'a')[key]) for key, value in before.items())
    records = steps(train('--max_steps=12', *FEW, '--init_from=resume'))
    assert records[-1]['grad_norm'] > 0 and not torch.equal(state(tmp_path / 'a')['wte.weight'], before['wte.weight'])


def test_float16_in_several_processes(train):
    """All processes skip the same steps."""
    whole = train('--max_steps=3', *FEW, out='a')
    sharded = train('--max_steps=3', *FEW, '--batch_size=2', '--shard=True', out='b', processes=2)
    assert losses(sharded)[0] == pytest.approx(losses(whole)[0], rel=1e-3)
    assert steps(sharded)[-1]['grad_norm'] > 0


@interop
@pytest.mark.skipif(not shutil.which('g++'), reason='compiles a minute of C++')
def test_compile(train, tmp_path):
    plain = train('--max_steps=3', out='a')
    compiled = train('--max_steps=3', '--compile=True', out='b', timeout=400)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert list(state(tmp_path / 'b')) == list(state(tmp_path / 'a'))


@interop
def test_a_terminal_gets_a_bar(train, tmp_path):
    """Under a pseudo-terminal the steps are a bar with loss, tokens/s and time left, no line each."""
    import fcntl
    import pty
    import struct
    import termios
    main, second = pty.openpty()
    fcntl.ioctl(second, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, ROOT / 'train.py', *FLAGS, '--out_dir=t', '--max_steps=12'],
                               cwd=tmp_path, stdout=second, stderr=second, stdin=subprocess.DEVNULL)
    os.close(second)
    shown = b''
    began = time.monotonic()
    while time.monotonic() - began < 100:
        try:
            shown += os.read(main, 1 << 16)
        except OSError:
            break
    assert process.wait() == 0
    assert b'tokens/s' in shown and b'12/12' in shown and b'step 2/12 |' not in shown and b'val loss' in shown
