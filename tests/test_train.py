"""The loop through its own command: what it logs, saves, resumes and refuses; one process and several."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TORCHRUN, Started
from torch.nn import functional as F

from model import GPT, GPTConfig
from prepare import first_targets, make_batch, read_split

NAME = 'gpt2-2x32-sft'


@pytest.fixture
def train(run, prepared, tmp_path, monkeypatch):
    """train(flag, ..., out='a', launcher=(), **of stage) -> the records of the run's log, after train.py ended with code."""
    shutil.copytree(prepared / 'data', tmp_path / 'data')
    monkeypatch.chdir(tmp_path)  # where read_split looks

    def train(*flags, out='a', launcher=(), **kwargs):
        train.shown = run(*launcher, 'train.py', *TINY, '--dataset=tiny', f'--out_dir={out}', *flags, **kwargs)
        log = tmp_path / out / 'log.jsonl'
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return train


def steps(records):
    """The training records without their times."""
    return [{key: value for key, value in record.items() if key != 'seconds'} for record in records if 'loss' in record]


def state(folder):
    return torch.load(folder / f'{NAME}.pth', weights_only=True)


def started(folder, *flags):
    """-> the process of a run."""
    return Started(folder, [ROOT / 'train.py', *TINY, '--dataset=tiny', *flags], {})


def test_a_run(train, tmp_path):
    """Artifacts, records, and each logged loss and update against an independent loop."""
    records = train('--max_steps=4', '--packing=False', '--eval_iters=0', '--shuffle=False')
    assert {path.name for path in (tmp_path / 'a').iterdir()} == \
        {'log.jsonl', 'ckpt.pt', f'{NAME}.pth', f'{NAME}.json', 'loss.png'}
    assert (tmp_path / 'a/loss.png').read_bytes().startswith(b'\x89PNG')
    assert [r['step'] for r in records if 'val_loss' in r] == [0, 4] and [r['step'] for r in steps(records)] == [1, 2, 3, 4]
    assert set(records[1]) == {'step', 'loss', 'lr', 'supervised_tokens', 'tokens', 'seconds', 'grad_norm'}
    # chapter 7's way: a row at a time, full logits, all parameters in one AdamW
    data = {split: read_split('tiny', split) for split in ('train', 'val')}
    torch.manual_seed(123)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128))

    def total(split, numbers):
        ids, meta = data[split]
        loss, count = 0.0, 0
        for n in numbers:
            row = torch.from_numpy(ids[meta['start'][n]:meta['end'][n]].astype(np.int64))
            first = int(meta['answer'][n] - meta['start'][n])
            loss = loss + F.cross_entropy(model(row[None])[0][0, first - 1:-1], row[first:], reduction='sum')
            count += len(row) - first
        return loss, count

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    loss, count = total('val', range(len(data['val'][1]['start'])))
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


def test_the_same_seed_gives_the_same_log_and_packing_the_same_losses(train):
    one = train('--max_steps=5', '--dropout=0.1', out='a')
    two = train('--max_steps=5', '--dropout=0.1', out='b')
    assert steps(one) == steps(two) and one[0] == two[0]
    plain, packed = train('--max_steps=5', '--packing=False', out='c'), train('--max_steps=5', out='d')
    assert [r['loss'] for r in steps(plain)] == pytest.approx([r['loss'] for r in steps(packed)], rel=1e-5)


def test_an_epoch_takes_every_row_once(train):
    records = train('--epochs=2', '--sample_every_epoch=True', '--max_steps=0')
    rows = len(read_split('tiny', 'train')[1]['start'])
    tokens = int(read_split('tiny', 'train')[1]['tokens'])
    a_epoch = math.ceil(rows / 8)
    assert len(steps(records)) == 2 * a_epoch
    assert sum(r['tokens'] for r in steps(records)[:a_epoch]) == tokens == sum(r['tokens'] for r in steps(records)[a_epoch:])
    assert steps(records)[0]['supervised_tokens'] != steps(records)[a_epoch]['supervised_tokens']  # another order
    assert train.shown.stdout.count('reference:') == 6  # three val prompts, answered at each end


@pytest.mark.parametrize('extra', [(), ('--lora_rank=4', '--lora_dropout=0.1'), ('--init=copying', '--n_head=4')])
def test_resume_is_bit_for_bit(train, tmp_path, extra):
    flags = '--dropout=0.1', '--schedule=linear', '--warmup_steps=2', *extra
    whole = train('--max_steps=12', *flags, '--save_interval=6', out='a')
    checkpoint = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)
    assert checkpoint['progress']['step'] == 12 and not any('_orig_mod' in key or 'module.' in key for key in checkpoint['model'])
    # killed after its checkpoint of step 6 (past an epoch's middle): what it logged behind that is made anew
    process = started(tmp_path, *flags, '--out_dir=c', '--max_steps=12', '--save_interval=6', '--eval_interval=1')
    process.signal_when(lambda: '\nstep 8/' in process.output()[0], signal.SIGKILL)
    assert torch.load(tmp_path / 'c/ckpt.pt', weights_only=True)['progress']['step'] == 6
    resumed = train('--max_steps=12', *flags, '--init_from=resume', '--save_interval=6', out='c')
    assert steps(resumed) == steps(whole)
    a, c = state(tmp_path / 'a'), state(tmp_path / 'c')
    assert all(torch.equal(a[key], c[key]) for key in a)


def test_ctrl_c_saves_and_ends_cleanly(train, prepared, tmp_path):
    whole = train('--max_steps=30', out='a')
    process = started(tmp_path, '--out_dir=b', '--max_steps=30')
    process.signal_when(lambda: '\nstep 3/' in process.output()[0], signal.SIGINT)
    stdout, stderr = process.output()
    assert process.returncode == 0 and 'stopped at step' in stdout and 'Traceback' not in stderr
    assert (tmp_path / 'b' / f'{NAME}.pth').exists()
    assert steps(train('--max_steps=30', '--init_from=resume', out='b')) == steps(whole)


def test_resume_refuses_another_run(train, tmp_path):
    train('--max_steps=2')
    train('--max_steps=4', '--init_from=resume', '--n_embd=64', '--learning_rate=0.1', code=2)
    assert 'n_embd was 32, is 64' in train.shown.stderr and 'learning_rate was 0.001, is 0.1' in train.shown.stderr
    train('--init_from=resume', out='nothing', code=2)
    assert 'nothing/ckpt.pt' in train.shown.stderr
    # the same rows, split otherwise: what was trained on may now be in val
    meta = json.loads((tmp_path / 'data/tiny/train.json').read_text())
    (tmp_path / 'data/tiny/train.json').write_text(json.dumps(meta | {'split_seed': 7}))
    train('--max_steps=4', '--init_from=resume', code=2)
    assert f'data_split_seed was {meta["split_seed"]}, is 7' in train.shown.stderr


def test_accumulation_and_processes_are_one_step(train, tmp_path):
    """8x1, 2x2x2 processes, 4x2 processes sharded: the same losses, norms and weights; a short last batch does not hang."""
    flags = '--epochs=1', '--grad_clip=0.5', '--eval_iters=0', '--decay=matrices'
    one = train(*flags, '--batch_size=8', out='one')
    for out, extra, start in (('accumulated', ('--batch_size=2', '--gradient_accumulation_steps=4'), {}),
                              ('processes', ('--batch_size=2', '--gradient_accumulation_steps=2'), {'launcher': TORCHRUN}),
                              ('sharded', ('--batch_size=4', '--shard=True'), {'processes': 2})):
        other = train(*flags, *extra, out=out, **start)
        assert len(one) == len(other)
        for a, b in zip(one, other):
            for key in a.keys() - {'seconds'}:
                assert a[key] == pytest.approx(b[key], rel=2e-4 if key == 'grad_norm' else 1e-5), (out, key)
        a, b = state(tmp_path / 'one'), state(tmp_path / out)
        assert list(a) == list(b)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
    # more processes than rows in the epoch's last step: one of them has none
    rows = len(read_split('tiny', 'train')[1]['start'])
    train('--epochs=1', f'--batch_size={(rows - 1) // 2}', out='empty', processes=2)
    assert steps(train('--epochs=1', f'--batch_size={rows - 1}', out='full'))[-1]['tokens'] > 0


def test_resume_with_another_number_of_processes(train, tmp_path):
    whole = train('--max_steps=6', '--batch_size=4', '--gradient_accumulation_steps=2', out='a')
    train('--max_steps=3', '--batch_size=4', out='b', processes=2)
    resumed = train('--max_steps=6', '--batch_size=4', '--gradient_accumulation_steps=2', '--init_from=resume', out='b')
    assert [r['loss'] for r in steps(resumed)] == pytest.approx([r['loss'] for r in steps(whole)], rel=1e-5)
    train('--max_steps=8', '--batch_size=4', '--shard=True', '--init_from=resume', out='b', processes=2)


def test_schedules(train):
    def rates(*flags):
        return [r['lr'] for r in steps(train('--max_steps=5', '--warmup_steps=2', *flags))]
    assert rates() == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
    assert rates('--schedule=linear', '--min_lr=1e-4') == pytest.approx([5e-4, 1e-3, 1e-3, 7e-4, 4e-4])
    cosine = [1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
    assert rates('--schedule=cosine', '--min_lr=1e-4') == pytest.approx([5e-4, 1e-3, *cosine])
    train('--schedule=step', code=2)


def test_keep_best_and_patience(train, tmp_path):
    """A learning rate that soon overshoots: the model kept is the best one, and the run ends early."""
    records = train('--max_steps=60', '--learning_rate=3e-2', '--eval_interval=2', '--patience=3', '--keep_best=True', '--eval_iters=0')
    losses = {r['step']: r['val_loss'] for r in records if 'val_loss' in r}
    best = min((step for step in losses if step), key=losses.get)
    about = json.loads((tmp_path / 'a' / f'{NAME}.json').read_text())
    assert about['step'] == best and about['val_loss'] == losses[best] and max(losses) == best + 6 < 60


def test_a_run_that_diverges_keeps_its_checkpoint(train, tmp_path):
    train('--max_steps=3', '--save_interval=1')
    before = (tmp_path / 'a/ckpt.pt').read_bytes()
    checkpoint = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)
    checkpoint['model']['wte.weight'][:] = float('nan')
    torch.save(checkpoint, tmp_path / 'a/ckpt.pt')
    broken = (tmp_path / 'a/ckpt.pt').read_bytes()
    train('--max_steps=9', '--init_from=resume', '--save_interval=1', code=2)
    assert 'loss nan' in train.shown.stderr and (tmp_path / 'a/ckpt.pt').read_bytes() == broken != before


def test_a_full_disk_keeps_the_old_checkpoint(train, tmp_path):
    train('--max_steps=2')
    before = (tmp_path / 'a/ckpt.pt').read_bytes()
    limit = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, {len(before) // 2}))'
    train('--max_steps=4', '--init_from=resume', code=2, first=limit)
    assert 'cannot write a/ckpt.pt' in train.shown.stderr and (tmp_path / 'a/ckpt.pt').read_bytes() == before
    assert not list((tmp_path / 'a').glob('*.tmp'))


def test_rows_without_a_target_are_refused(train, tmp_path):
    meta = json.loads((tmp_path / 'data/tiny/train.json').read_text())
    meta['answer'][3] = meta['start'][4]
    (tmp_path / 'data/tiny/train.json').write_text(json.dumps(meta))
    train('--max_steps=2', code=2)
    assert 'no token to learn' in train.shown.stderr


@pytest.mark.parametrize('flags, said', [
    (['--dataset=absent'], 'run: python prepare.py'),
    (['--block_size=32'], 'prepare.py --block_size=32'),
    (['--batch_size=0'], 'batch_size=0 must be at least 1'),
    (['--max_steps=-1'], 'max_steps=-1 must be at least 0'),
    (['--n_head=3'], 'n_head'),
    (['--loss_on=prompt'], "loss_on='prompt' is none of answer, response, all"),
    (['--decay=none'], 'decay'),
    (['--device=tpu'], 'device'),
    (['--dtype=float8'], "'auto', 'float32', 'bfloat16', 'float16'"),
    (['--init_from=absent/model'], 'absent/model'),
    (['--quantize=nf4'], 'lora_rank'),
    (['--lora_rank=4', '--lora_targets=wte'], 'lora_targets'),
])
def test_mistakes_end_in_one_line(train, flags, said):
    train(*flags, code=2)
    assert said in train.shown.stderr


def test_bfloat16(train, tmp_path):
    plain = train('--max_steps=3', out='a')
    half = train('--max_steps=3', '--dtype=bfloat16', out='b')
    assert [r['loss'] for r in steps(half)] == pytest.approx([r['loss'] for r in steps(plain)], rel=2e-3)
    assert all(value.dtype == torch.float32 for value in state(tmp_path / 'b').values())


@pytest.mark.skipif('INTEROP' not in os.environ or not shutil.which('g++'), reason='a minute of C++: make interop')
def test_compile(train, tmp_path):
    plain = train('--max_steps=3', out='a')
    compiled = train('--max_steps=3', '--compile=True', out='b', timeout=400)
    assert [r['loss'] for r in steps(compiled)] == pytest.approx([r['loss'] for r in steps(plain)], rel=1e-4)
    assert list(state(tmp_path / 'b')) == list(state(tmp_path / 'a'))


def test_memory_does_not_grow_with_the_rows(data, tmp_path, monkeypatch):
    """Ids stay on the disk: of 60 MB a batch copies its own rows only, and offsets take 8 bytes each."""
    ids, meta = data('train')
    repeats = 30_000_000 // len(ids)
    (tmp_path / 'data/large').mkdir(parents=True)
    np.tile(ids, repeats).astype('<u2').tofile(tmp_path / 'data/large/train.bin')
    shift = np.arange(repeats)[:, None] * len(ids)
    large = {key: value for key, value in meta.items() if key != 'end'} | {'tokens': len(ids) * repeats}
    large |= {name: (shift + meta[name]).ravel().tolist() for name in ('start', 'header', 'answer')}
    (tmp_path / 'data/large/train.json').write_text(json.dumps(large))
    monkeypatch.chdir(tmp_path)
    large_data = read_split('large', 'train')
    n = meta['examples'] * repeats
    assert large_data[0].nbytes > 59e6 and first_targets(large_data[1], 'answer').nbytes == 8 * n
    tracemalloc.start()
    batch = make_batch(large_data, [0, n // 2, n - 1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 and batch[0].shape[0] == 1


FEW = '--batch_size=4', '--eval_iters=1'  # float16 is slow on a CPU


def test_float16(train, tmp_path):
    """With its GradScaler: the losses are fp32's but for rounding, a resumed run is bit for bit the unbroken one."""
    plain = train('--max_steps=4', *FEW, out='a')
    half = train('--max_steps=4', '--dtype=float16', *FEW, out='b')
    assert [r['loss'] for r in steps(half)] == pytest.approx([r['loss'] for r in steps(plain)], rel=5e-3)
    assert [r['grad_norm'] for r in steps(half)] == pytest.approx([r['grad_norm'] for r in steps(plain)], rel=5e-2)
    assert {r['loss_scale'] for r in steps(half)} == {65536.0} and 'loss_scale' not in steps(plain)[0]
    assert all(value.dtype == torch.float32 for value in state(tmp_path / 'b').values())
    train('--max_steps=2', '--dtype=float16', *FEW, out='c')
    resumed = train('--max_steps=4', '--dtype=float16', *FEW, '--init_from=resume', out='c')
    assert steps(resumed) == steps(half)
    assert all(torch.equal(value, state(tmp_path / 'c')[key]) for key, value in state(tmp_path / 'b').items())


def test_float16_skips_a_step_that_overflows(train, tmp_path):
    """The scaler's state is in the checkpoint: with one that is far too large, steps are skipped and it is halved."""
    train('--max_steps=2', '--dtype=float16', *FEW)
    before = state(tmp_path / 'a')
    checkpoint = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)
    checkpoint['scaler']['scale'] = 2.0 ** 24
    torch.save(checkpoint, tmp_path / 'a/ckpt.pt')
    records = steps(train('--max_steps=3', '--dtype=float16', *FEW, '--init_from=resume'))
    assert records[-1]['grad_norm'] is None and records[-1]['loss_scale'] == 2.0 ** 23
    assert all(torch.equal(value, state(tmp_path / 'a')[key]) for key, value in before.items())
    records = steps(train('--max_steps=14', '--dtype=float16', *FEW, '--init_from=resume'))
    assert records[-1]['grad_norm'] > 0 and not torch.equal(state(tmp_path / 'a')['wte.weight'], before['wte.weight'])


def test_float16_in_several_processes(train):
    half = train('--max_steps=3', '--dtype=float16', '--batch_size=4', out='a')
    two = train('--max_steps=3', '--dtype=float16', out='b', processes=2)
    sharded = train('--max_steps=3', '--dtype=float16', '--shard=True', out='c', processes=2)
    assert steps(two)[0]['loss'] == pytest.approx(steps(half)[0]['loss'], rel=1e-3)
    # all processes skip the same steps; in another number of them gradients are scaled otherwise, so other steps
    for a, b in zip(steps(two), steps(sharded)):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-4) and a['loss_scale'] == b['loss_scale']
    assert steps(two)[-1]['grad_norm'] > 0


def test_resume_with_micro_batches_cut_otherwise(train, tmp_path):
    """The same examples per step may be cut into other micro-batches; another number of them is another run."""
    whole = train('--max_steps=4', out='a')
    train('--max_steps=2', out='b')
    train('--max_steps=4', '--batch_size=2', '--init_from=resume', out='b', code=2)
    assert 'examples_per_step was 8, is 2' in train.shown.stderr
    train('--max_steps=4', '--batch_size=4', '--gradient_accumulation_steps=4', '--init_from=resume', out='b', code=2)
    resumed = train('--max_steps=4', '--batch_size=2', '--gradient_accumulation_steps=4', '--init_from=resume', out='b')
    assert [r['loss'] for r in steps(resumed)] == pytest.approx([r['loss'] for r in steps(whole)], rel=1e-5)


def test_resume_after_a_crash_cut_the_log(train, tmp_path):
    train('--max_steps=3')
    with open(tmp_path / 'a/log.jsonl', 'a') as file:
        file.write('{"step": 3, "lo')
    assert [r['step'] for r in steps(train('--max_steps=5', '--init_from=resume'))] == [1, 2, 3, 4, 5]


def test_a_resumed_run_makes_up_for_an_evaluation_that_was_left_out(train, tmp_path):
    """A signal at a step that is to be evaluated ends the run without; what is logged in the end is all the same."""
    whole = train('--max_steps=6', '--eval_interval=2', out='a')
    train('--max_steps=4', '--eval_interval=2', out='b')
    checkpoint = torch.load(tmp_path / 'b/ckpt.pt', weights_only=True)
    checkpoint['progress']['evaluated'] = 2
    torch.save(checkpoint, tmp_path / 'b/ckpt.pt')
    records = [json.loads(line) for line in (tmp_path / 'b/log.jsonl').read_text().splitlines()]
    (tmp_path / 'b/log.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records[:-1]))
    resumed = train('--max_steps=6', '--eval_interval=2', '--init_from=resume', out='b')
    assert [r for r in resumed if 'val_loss' in r] == [r for r in whole if 'val_loss' in r] and steps(resumed) == steps(whole)


def test_a_run_that_patience_ended_stays_ended(train, tmp_path):
    flags = '--max_steps=60', '--learning_rate=3e-2', '--eval_interval=2', '--patience=2', '--eval_iters=0'
    ended = train(*flags)
    checkpoint = (tmp_path / 'a/ckpt.pt').read_bytes()
    assert train(*flags, '--init_from=resume') == ended and steps(ended)[-1]['step'] < 60
    assert (tmp_path / 'a/ckpt.pt').read_bytes() == checkpoint


def test_keep_best_from_a_resume_on(train, tmp_path):
    """The best val loss of before is of a model that nobody kept: there is a .pth at the end, and it is of a later step."""
    train('--max_steps=10', '--learning_rate=3e-2', '--eval_interval=2')
    (tmp_path / 'a' / f'{NAME}.pth').unlink()
    train('--max_steps=14', '--learning_rate=3e-2', '--eval_interval=2', '--keep_best=True', '--init_from=resume')
    about = json.loads((tmp_path / 'a' / f'{NAME}.json').read_text())
    assert (tmp_path / 'a' / f'{NAME}.pth').exists() and about['step'] > 10


def test_checkpoints_of_before_the_fold(train, tmp_path):
    """They call the progress `at`, and hold neither the scaler nor the examples per step."""
    whole = train('--max_steps=4', out='a')
    train('--max_steps=2', out='b')
    checkpoint = torch.load(tmp_path / 'b/ckpt.pt', weights_only=True)
    checkpoint['at'] = checkpoint.pop('progress')
    del checkpoint['scaler'], checkpoint['examples_per_step']
    torch.save(checkpoint, tmp_path / 'b/ckpt.pt')
    assert steps(train('--max_steps=4', '--init_from=resume', out='b')) == steps(whole)
    assert all(torch.equal(value, state(tmp_path / 'b')[key]) for key, value in state(tmp_path / 'a').items())


def test_a_terminal_gets_a_bar(train, tmp_path):
    """Under a pseudo-terminal the steps are a bar with loss, tokens/s and time left, no line each."""
    import fcntl
    import pty
    import struct
    import termios
    main, second = pty.openpty()
    fcntl.ioctl(second, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, ROOT / 'train.py', *TINY, '--dataset=tiny', '--out_dir=t', '--max_steps=12'],
                               cwd=tmp_path, stdout=second, stderr=second, stdin=subprocess.DEVNULL)
    os.close(second)
    shown, began = b'', time.time()
    while time.time() - began < 100:
        try:
            shown += os.read(main, 1 << 16)
        except OSError:
            break
    assert process.wait() == 0
    assert b'tokens/s' in shown and b'12/12' in shown and b'step 2/30 |' not in shown and b'val loss' in shown


def test_copying_is_not_sharded(train):
    train('--n_head=4', '--init=copying', '--shard=True', processes=2, code=2)
    assert "init='copying' goes with one process or several, not with shard=True" in train.shown.stderr


def test_processes_tell_a_mistake_too(run):
    """torch's own handling of exceptions in several processes must not swallow the line."""
    shown = run(*TORCHRUN, 'train.py', *TINY, '--dataset=absent', code=1).stderr
    assert 'train.py: cannot read split train of data/absent' in shown
