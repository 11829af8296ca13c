"""
What labels by self-consistency are worth, on the demo's families: do answers that agree tend to be right, and what does training
on them bring. For each seed: a model trained on few labels gives labels to the other rows; then one is trained on few labels and
these, and one on all labels, for as many steps.

    python data/make_demo.py                # writes the rows
    python tests/bench_labels.py            # seeds 123, 1 and 2: half an hour on two cores
    python tests/bench_labels.py 123 --steps=300
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FEW = 0.25  # the share of the training rows that has labels
SAMPLES = 8  # answers to each of the others


def stage(folder, name, *flags):
    command = [sys.executable, ROOT / name, ROOT / 'config/demo.py', *flags]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def tune(folder, name, rows, seed, steps):
    """Prepare, train, sample and score: the exact match of the test rows, and its difference to the run few's."""
    (folder / f'{name}.json').write_text(json.dumps(rows))
    own = f'--source={name}.json', '--val_source=val.json', '--test_source=test.json', '--split_seed=123'
    stage(folder, 'prepare.py', *own, f'--dataset={name}')
    flags = f'--dataset={name}', f'--out_dir={name}'
    stage(folder, 'train.py', *flags, f'--init_from={ROOT / "data/demo_start.pth"}', f'--seed={seed}', f'--max_steps={steps}',
          '--eval_interval=100000', '--sample_every_epoch=False')
    stage(folder, 'sample.py', *flags, '--before=False')
    baseline = 'none' if name == 'few' else 'few/instruction-data-with-response.json'
    stage(folder, 'judge.py', f'--out_dir={name}', f'--baseline={baseline}')
    return json.loads((folder / name / 'scores.json').read_text())['metrics']['all']['exact match %']


def text(interval):
    if interval['low'] is None:
        return f'{interval["value"]:.1f}'
    return f'{interval["value"]:.1f} [{interval["low"]:.1f}, {interval["high"]:.1f}]'


def read_demo_rows(folder, seed, n_rows):
    """The demo's rows for training, so many of them, shuffled; its test and val rows are written to files of their own."""
    stage(folder, 'prepare.py', f'--source={ROOT / "data/demo.json"}')
    held_out = []
    for split in 'test', 'val':
        rows = json.loads((folder / f'data/demo/{split}.json').read_text())['rows']
        (folder / f'{split}.json').write_text(json.dumps(rows[:n_rows]))
        held_out += rows
    held_out = {json.dumps(row, sort_keys=True) for row in held_out}
    rows = [row for row in json.loads((ROOT / 'data/demo.json').read_text()) if json.dumps(row, sort_keys=True) not in held_out]
    random.Random(seed).shuffle(rows)
    return rows[:n_rows]


def experiment(folder, seed, n_rows, steps):
    rows = read_demo_rows(folder, seed, n_rows)
    n_few = int(FEW * len(rows))
    scores = {'few': tune(folder, 'few', rows[:n_few], seed, steps)}
    (folder / 'unlabelled.json').write_text(json.dumps(rows[n_few:]))
    began = time.perf_counter()
    stage(folder, 'label.py', '--out_dir=few', '--label_rows=unlabelled.json', f'--self_consistency={SAMPLES}', f'--seed={seed}')
    seconds = time.perf_counter() - began
    labelled = json.loads((folder / 'few/pseudo-labels.json').read_text())
    n_right = sum(row['output'] == row['reference'] for row in labelled)
    scores['few and pseudo-labels'] = tune(folder, 'pseudo', rows[:n_few] + labelled, seed, steps)
    scores['all'] = tune(folder, 'all', rows, seed, steps)
    print(f'\nseed {seed}: {n_few} labelled rows, {len(rows) - n_few} others, {len(labelled)} of them got a label by {SAMPLES} answers '
          f'({seconds:.0f} s), {100 * n_right / max(1, len(labelled)):.1f} % of these labels are right')
    print('agreement      rows  right %')
    for line in json.loads((folder / 'few/pseudo-labels.about.json').read_text())['reliability']:
        share = {key: 100 * value for key, value in line['right'].items()}
        print(f'{line["from"]:.2f} to {line["to"]:.2f}{line["rows"]:7}  {text(share)}')
    for name, found in scores.items():
        gain = f', {text(found["difference"])} more than few' if 'difference' in found else ''
        print(f'{name:24} exact match {text(found["run"])} %{gain}', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('seeds', type=int, nargs='*', default=[123, 1, 2])
    parser.add_argument('--rows', type=int, default=10_500, help='for training, labelled and not')
    parser.add_argument('--steps', type=int, default=1800, help='of each training')
    args = parser.parse_args()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            experiment(Path(folder), seed, args.rows, args.steps)
