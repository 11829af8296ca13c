"""
Random SIGKILLs over prepare.py, train.py, sample.py and judge.py: a stage that was killed, at any time and as often as may be, and then
started again, leaves the same as one that ran through.

    python tests/bench_kills.py --kills=300     # Linux

The time of a kill is drawn from the CPU time that the stage takes without one, so that a busy machine does not make all kills early ones.
train.py is started again by --init_from=resume where there is a checkpoint, and now and then by the same command, as a fresh start.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from conftest import NO_PICTURE, TINY, Started  # noqa: E402
from fake_judge import FakeJudge, honest  # noqa: E402

OUT = '--out_dir=out', '--dataset=tiny'
COMMANDS = {
    'prepare': ('prepare.py', '--source=rows.json', '--dataset=tiny', '--block_size=128'),
    'train': ('train.py', *TINY, *OUT, '--epochs=1', '--save_interval=2', '--dropout=0.1'),
    'tune': ('train.py', *TINY[4:], *OUT, '--init_from=base', '--out_dir=lora', '--lora_rank=4', '--epochs=1', '--save_interval=2'),
    'sample': ('sample.py', *OUT, '--max_new_tokens=8'),
    'judge': ('judge.py', '--out_dir=out', '--calibrate=0', '--judge_backoff=0.01', '--judge_workers=2'),
}
# what names the moment or the folder, not what was computed
PASSING = {'seconds', 'time', 'date', 'started', 'tokens_per_second', 'memory', 'config', 'step_seconds'}


def without_passing(value):
    """A value of JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: without_passing(cell) for key, cell in value.items() if key not in PASSING}
    return [without_passing(cell) for cell in value] if isinstance(value, list) else value


def results(folder):
    """{path: content} of what the stages left in a folder; the runs that were moved aside, and the parts of judge.py's cache, excepted."""
    found = {}
    for path in sorted(folder.rglob('*')):
        name = str(path.relative_to(folder))
        if not path.is_file() or 'replaced-' in name:
            continue
        if path.name in ('log.jsonl', 'judge.jsonl'):
            records = [without_passing(json.loads(line)) for line in path.read_text().splitlines()]
            found[name] = sorted(json.dumps(record, sort_keys=True) for record in records)
        elif path.suffix == '.json':
            found[name] = without_passing(json.loads(path.read_text()))
        elif path.name == 'ckpt.pt':
            import torch
            checkpoint = torch.load(path, weights_only=True)
            found[name] = [checkpoint['progress'], {key: weight.tolist() for key, weight in checkpoint['model'].items()}]
        elif path.suffix == '.safetensors':  # its metadata tell the config, in which init_from is resume
            from safetensors.numpy import load_file
            found[name] = {key: weight.tolist() for key, weight in load_file(path).items()}
        elif path.suffix != '.html':  # the report tells when it was made
            found[name] = path.read_bytes()
    return found


def start(folder, stage, server, is_fresh=True):
    """The stage's process."""
    command = COMMANDS[stage]
    if not is_fresh:
        command = *[flag for flag in command if not flag.startswith('--init_from')], '--init_from=resume'
    return Started(folder, command, {'OLLAMA_HOST': server.url}, NO_PICTURE)


def cpu_seconds(pid):
    """(the CPU seconds that a process has used, whether it has ended); one that has is not reaped before Started.wait."""
    state, *figures = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(figures[10]) + int(figures[11])) / os.sysconf('SC_CLK_TCK'), state == 'Z'


def run_until(process, seconds):
    """Wait until a process has used so much CPU time, or has ended. Return the seconds that it has used."""
    used = 0
    has_ended = False
    while used < seconds and not has_ended:
        time.sleep(0.003)
        used, has_ended = cpu_seconds(process.pid)
    return used


def run_through(folder, stage, server):
    """Run the stage, and return its CPU seconds."""
    process = start(folder, stage, server)
    used = run_until(process, float('inf'))
    assert process.wait() == 0, process.output()
    return used


def run_with_kills(folder, stage, server, seconds, n_kills, draw):
    """Start the stage until it ends by itself, and kill it up to n_kills times within its CPU seconds. Return how often it was killed."""
    n_killed = 0
    out = folder / ('lora' if stage == 'tune' else 'out')
    while True:
        is_fresh = not (out / 'ckpt.pt').exists() or stage not in ('train', 'tune') or draw.random() < 0.2
        process = start(folder, stage, server, is_fresh)
        if n_killed < n_kills:
            run_until(process, draw.uniform(0, 1.1) * seconds)
            os.kill(process.pid, signal.SIGKILL)
        code = process.wait()
        if code == 0:
            return n_killed
        assert code == -signal.SIGKILL, (stage, code, process.output())
        n_killed += 1


def main(n_kills, seed):
    os.environ['OMP_NUM_THREADS'] = '1'
    draw = random.Random(seed)
    killed = Counter()
    runs = Counter()
    n_differing = 0
    words = 'red blue green cat dog house tree sun'.split()
    rows = [{'instruction': f'Say {a} and {b}.', 'input': '', 'output': f'{a} {b}'} for a in words for b in words]
    with tempfile.TemporaryDirectory() as root, FakeJudge(honest) as server:
        server.delay = 0.02
        root = Path(root)
        # once without kills: before[stage] is a folder as the stage finds it
        whole = root / 'whole'
        whole.mkdir()
        (whole / 'rows.json').write_text(json.dumps(rows))
        run_through(whole, 'prepare', server)  # the first process imports what the others share
        shutil.rmtree(whole / 'data')
        before = {}
        expected = {}
        seconds = {}
        for stage in COMMANDS:
            before[stage] = root / f'before {stage}'
            shutil.copytree(whole, before[stage])
            seconds[stage] = run_through(whole, stage, server)
            expected[stage] = results(whole)
            if stage == 'train':
                shutil.copytree(whole / 'out', whole / 'base')
        print('CPU seconds without kills:', seconds, flush=True)

        while killed.total() < n_kills:
            stage = draw.choice(list(COMMANDS))
            folder = root / 'killed'
            shutil.copytree(before[stage], folder)
            killed[stage] += run_with_kills(folder, stage, server, seconds[stage], draw.randint(1, 5), draw)
            runs[stage] += 1
            found = results(folder)
            differing = {name for name in found.keys() | expected[stage].keys() if found.get(name) != expected[stage].get(name)}
            if differing:
                n_differing += 1
                print(f'{stage} differs in {differing}', flush=True)
                shutil.copytree(folder, f'/tmp/differs-{n_differing}', dirs_exist_ok=True)
            shutil.rmtree(folder)
            print(f'{killed.total()} kills', end='\r', flush=True)
        server.shutdown()
    each = ', '.join(f'{stage} {count} in {runs[stage]} runs' for stage, count in killed.items())
    print(f'{killed.total()} kills ({each}): {n_differing} of {runs.total()} runs differ from one without kills')
    return n_differing


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=300)
    parser.add_argument('--seed', type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.seed) > 0)
