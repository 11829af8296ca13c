"""
What judge.py itself costs a row, beside a server that answers at once.

    python tests/bench_judge.py            # 5,200 rows, or so many as an argument
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def bench_judge(n=5200, workers=1):
    """Print the wall time a row of judging n rows, metrics and report included, and that of a run that asks nothing."""
    rows = []
    for k in range(n):
        rows.append({'instruction': f'Name {k} trees.', 'input': '', 'output': f'Birch, oak, fir and {k} others that grow here.',
                     'model_response': f'Birch, oak and {k} more of them.', 'truncated': False, 'family': f'family {k % 10}'})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'out').mkdir()
        Path(folder, 'out', 'instruction-data-with-response.json').write_text(json.dumps(rows))
        server = subprocess.Popen([sys.executable, HERE / 'fake_judge.py'], stdout=subprocess.PIPE, text=True)
        env = os.environ | {'OLLAMA_HOST': f'127.0.0.1:{server.stdout.readline().strip()}'}
        command = [sys.executable, HERE.parent / 'judge.py', f'--judge_workers={workers}', '--calibrate=0']
        for what in ('asking all', 'asking none'):
            start = time.perf_counter()
            cpu = os.times()
            subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
            wall = time.perf_counter() - start
            spent = os.times()
            own = spent.children_user + spent.children_system - cpu.children_user - cpu.children_system
            print(f'judge {n:,} rows, {what}: {wall:.1f} s, {1000 * wall / n:.2f} ms a row with the server\'s part, '
                  f'{1000 * own / n:.2f} ms of its own CPU time')
        server.terminate()
        server.wait()


if __name__ == '__main__':
    bench_judge(*map(int, sys.argv[1:2]))
