"""
What labels by self-consistency are worth, on the demo's families: do answers that agree tend to be right, and what does training on
them bring. For each seed: a model trained on few labels gives labels to the other rows; then one is trained on few labels and these,
and one on all labels, for as many steps.

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
N_ROWS, FEW, SAMPLES = 10_500, 0.25, 8  # training rows; the share of them that has labels; answers to each of the others


def stage(folder, name, *flags):
    command = [sys.executable, ROOT / name, ROOT / 'config/demo.py', *flags]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def tune(folder, name, sources, shares, seed, steps):
    """Prepare, train, sample and score -> the exact match of the test rows, and its difference to the run few's."""
    stage(folder, 'prepare.py', f'--source={",".join(sources)}', f'--dataset={name}', '--split_seed=-1',
          f'--train_share={shares[0]}', f'--test_share={shares[1]}')
    flags = f'--dataset={name}', f'--out_dir={name}'
    stage(folder, 'train.py', *flags, f'--seed={seed}', f'--max_steps={steps}', '--eval_interval=100000', '--sample_every_epoch=False')
    stage(folder, 'sample.py', *flags, '--before=False')
    few = [] if name == 'few' else ['--baseline=few/instruction-data-with-response.json']
    stage(folder, 'judge.py', f'--out_dir={name}', *few)
    return json.loads((folder / name / 'scores.json').read_text())['metrics']['all']['exact match %']


def text(interval):
    return f'{interval["value"]:.1f} [{interval["low"]:.1f}, {interval["high"]:.1f}]'


def experiment(folder, seed, steps):
    # the demo's own split; its training rows are those that are not held out
    stage(folder, 'prepare.py', f'--source={ROOT / "data/demo.json"}')
    held = {split: json.loads((folder / f'data/demo/{split}.json').read_text())['rows'] for split in ('test', 'val')}
    rows = json.loads((ROOT / 'data/demo.json').read_text())
    train = [row for row in rows if row not in held['test'] and row not in held['val']]
    random.Random(seed).shuffle(train)
    del train[N_ROWS:]
    n_few = int(FEW * len(train))
    n_test, held = len(held['test']), held['test'] + held['val']

    def run(name, *parts):
        """A run on these rows: the split cuts the files in their own order, so that test and val are the demo's."""
        files = [*parts, held]
        sources = [f'{name}-{i}.json' for i in range(len(files))]
        for source, its_rows in zip(sources, files):
            (folder / source).write_text(json.dumps(its_rows))
        n = sum(map(len, files))
        shares = (n - len(held) + .5) / n, (n_test + .5) / n
        return tune(folder, name, sources, shares, seed, steps)

    scores = {'few': run('few', train[:n_few])}
    (folder / 'unlabelled.json').write_text(json.dumps(train[n_few:]))
    began = time.perf_counter()
    stage(folder, 'sample.py', '--out_dir=few', f'--self_consistency={SAMPLES}', '--prompts=unlabelled.json', f'--seed={seed}')
    seconds = time.perf_counter() - began
    labelled = json.loads((folder / 'few/pseudo-labels.json').read_text())
    right = sum(row['output'] == row['reference'] for row in labelled)
    scores['few and pseudo-labels'] = run('pseudo', train[:n_few], labelled)
    scores['all'] = run('all', train)
    print(f'\nseed {seed}: {n_few} labelled rows, {len(train) - n_few} others, {len(labelled)} of them got a label by {SAMPLES} answers '
          f'({seconds:.0f} s), {100 * right / len(labelled):.1f} % of these labels are right')
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
    parser.add_argument('--steps', type=int, default=1800, help='of each training')
    args = parser.parse_args()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            experiment(Path(folder), seed, args.steps)
