"""Fixtures: the stages run as a user runs them, in a folder of their own."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def run(tmp_path):
    """run('prepare.py', '--dataset=x', ...) -> CompletedProcess of the stage, started in tmp_path; asserts the exit code."""
    def run(stage, *args, code=0, env=None, timeout=120):
        import os
        process = subprocess.run([sys.executable, ROOT / stage, *map(str, args)], cwd=tmp_path, capture_output=True, text=True,
                                 timeout=timeout, env=os.environ | (env or {}), stdin=subprocess.DEVNULL)
        assert process.returncode == code, process.stdout + process.stderr
        if code == 2:
            assert process.stderr.count('\n') == 1 and 'Traceback' not in process.stderr, process.stderr
        return process
    return run
