"""
The core upon the oldest and the newest torch that it is meant for, each installed into a folder that is removed afterwards: make versions.

That is some gigabytes a version (pip's torch is the CUDA build on Linux), so neither make test nor make interop does it.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

CORE = [f'tests/test_{name}.py' for name in ('batch', 'engine', 'load', 'prepare', 'sample', 'train')]


@pytest.mark.skipif('VERSIONS' not in os.environ, reason='downloads gigabytes: make versions')
@pytest.mark.parametrize('version', ['2.11.0', '2.15.0'])
def test_the_core_runs_on_torch(version):
    # pip's settings of this machine may hold torch at another version
    env = os.environ | {'PIP_CONFIG_FILE': os.devnull, 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    with tempfile.TemporaryDirectory() as folder:
        text = (ROOT / 'requirements.txt').read_text()
        needed = Path(folder, 'requirements.txt')
        needed.write_text(re.sub(r'^torch==\S+', f'torch=={version}', text, flags=re.MULTILINE))
        python = Path(folder, 'venv/bin/python')
        install = [python, '-m', 'pip', 'install', '-q', '--no-cache-dir', '-r', needed, '-r', ROOT / 'requirements-extra.txt', 'pytest', 'pytest-xdist']
        subprocess.run([sys.executable, '-m', 'venv', python.parent.parent], check=True)
        subprocess.run([*install, '-c', ROOT / 'requirements-dev.txt'], env=env, check=True)
        found = subprocess.check_output([python, '-c', 'import torch; print(torch.__version__)'], text=True)
        assert found.startswith(version)
        subprocess.run([python, '-m', 'pytest', '-q', '-n', 'auto', '-p', 'no:cacheprovider', *CORE], cwd=ROOT, env=env, check=True)
