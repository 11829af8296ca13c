"""
prepare.py on many short rows, against tiktoken alone on the same text; and train.py's start on what it wrote.

    python tests/bench_prepare.py            # 2,000,000 rows, JSONL: some minutes, 2 GB of disk
    python tests/bench_prepare.py 100000
"""
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from bench_load import peak  # noqa: E402

TRAIN = ('--init_from=scratch', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=256', '--learning_rate=1e-3', '--max_steps=3',
         '--eval_interval=100', '--sample_every_epoch=False')


def write_rows(path, n):
    """JSONL of rows of about 150 bytes: words of the demo's rows in any order, and a number, which makes each one different."""
    words = set()
    for row in json.loads((ROOT / 'data/demo.json').read_text()):
        words |= {*row['instruction'].split(), *row['output'].split()}
    words = sorted(words)
    draw = random.Random(0)
    with open(path, 'w') as file:
        for i in range(n):
            drawn = draw.choices(words, k=17)
            row = {'instruction': ' '.join(drawn[:8]) + f' {i}.', 'input': '' if i % 3 else ' '.join(drawn[8:11]), 'output': ' '.join(drawn[11:])}
            file.write(json.dumps(row) + '\n')


def run_stage(folder, name, *flags):
    """(seconds, peak bytes of its process)."""
    began = time.perf_counter()
    process = subprocess.run([sys.executable, __file__, 'stage', ROOT / name, *flags], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return time.perf_counter() - began, int(process.stdout.rpartition('peak ')[2])


def tiktoken_seconds(path):
    """{way: seconds} in which tiktoken alone encodes prompts and answers: its batch on all cores, and one by one in one thread."""
    from prepare import format_prompt, get_tokenizer
    tokenizer = get_tokenizer()
    seconds = {'encode_ordinary_batch': 0.0, 'encode_ordinary, a thread': 0.0}

    def measure(texts):
        began = time.perf_counter()
        tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        between = time.perf_counter()
        for text in texts:
            tokenizer.encode_ordinary(text)
        ended = time.perf_counter()
        seconds['encode_ordinary_batch'] += between - began
        seconds['encode_ordinary, a thread'] += ended - between

    with open(path) as file:
        while lines := list(itertools.islice(file, 100_000)):
            texts = []
            for row in map(json.loads, lines):
                texts += [format_prompt(row), row['output']]
            measure(texts)
    return seconds


def main(n):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_rows(folder / 'rows.jsonl', n)
        write_rows(folder / 'few.jsonl', 2000)
        size = (folder / 'rows.jsonl').stat().st_size
        theirs = tiktoken_seconds(folder / 'rows.jsonl')
        seconds, memory = run_stage(folder, 'prepare.py', '--source=rows.jsonl', '--dataset=many')
        run_stage(folder, 'prepare.py', '--source=few.jsonl', '--dataset=few')
        print(f'\n## prepare\n\n{n:,} rows, {size / 1e6:.0f} MB of JSONL: {seconds:.1f} s, {n / seconds:,.0f} rows/s, peak {memory / 1e6:.0f} MB')
        for way, its_seconds in theirs.items():
            print(f"{seconds / its_seconds:.2f} times the {its_seconds:.1f} s of tiktoken's {way} on the whole prompts and answers")
        for name in 'few', 'many':
            rows = json.loads((folder / f'data/{name}/train.json').read_text())['examples']
            seconds, memory = run_stage(folder, 'train.py', f'--dataset={name}', *TRAIN)
            print(f'train.py, 3 steps of a tiny model on {rows:,} rows: {seconds:.1f} s, peak {memory / 1e6:.0f} MB', flush=True)


if __name__ == '__main__' and sys.argv[1:2] == ['stage']:
    import runpy
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name='__main__')
    print('peak', peak())
elif __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000)
