"""model.py, copied alone into an empty folder, with torch, numpy and google-crc32c and nothing else installed."""
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TINY = ROOT / 'tests/fixtures/openai-tiny'
CODE = f"""
import importlib.util, json
import numpy as np, torch
from model import GPT
model, expected = GPT.from_pretrained({str(TINY)!r}).eval(), np.load({str(TINY / 'expected.npz')!r})
ids = torch.from_numpy(expected['tokens']).long()
with torch.no_grad():
    difference = (model(ids)[0] - torch.from_numpy(expected['logits'])).abs().max().item()
answers = model.generate(ids.tolist(), 20, eos=-1)
absent = [name for name in ('requests', 'tqdm', 'tiktoken', 'safetensors', 'config', 'prepare', 'pytest')
          if importlib.util.find_spec(name) is None]
print(json.dumps([difference, answers == expected['greedy'].tolist(), absent]))
"""


def required_by(*names):
    """-> the names of these packages and of all that they require."""
    from packaging.requirements import Requirement
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r'[-_.]+', '-', todo.pop()).lower()
        if name not in found:
            found.add(name)
            for text in importlib.metadata.requires(name) or []:
                requirement = Requirement(text)
                if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
                    todo.append(requirement.name)
    return found


@pytest.fixture
def alone(tmp_path):
    """A folder with model.py, and one with links to what torch, numpy and google-crc32c are and require."""
    site, folder = tmp_path / 'site', tmp_path / 'empty'
    site.mkdir()
    folder.mkdir()
    shutil.copy(ROOT / 'model.py', folder)
    for name in required_by('torch', 'numpy', 'google-crc32c'):
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files} - {'..', '__pycache__'}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(distribution.locate_file(top)))
    return folder, site


def test_it_loads_and_generates(alone):
    folder, site = alone
    env = {key: value for key, value in os.environ.items() if not key.startswith('PYTHON')} | {'PYTHONPATH': str(site)}
    process = subprocess.run([sys.executable, '-S', '-c', CODE], cwd=folder, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    difference, equal, absent = json.loads(process.stdout.splitlines()[-1])
    assert difference < 5e-5 and equal
    assert set(absent) == {'requests', 'tqdm', 'tiktoken', 'safetensors', 'config', 'prepare', 'pytest'}


def test_the_layout():
    """The top level is what DESIGN lists, and imports run one way: config, prepare and model, lora, the stages."""
    modules = sorted(path.name for path in ROOT.glob('*.py'))
    assert set(modules) <= {'prepare.py', 'model.py', 'train.py', 'sample.py', 'judge.py', 'lora.py', 'export.py', 'serve.py'}
    assert not list(ROOT.glob('*.html'))
    names = {path.stem for path in ROOT.glob('*.py')} | {'config'}
    imports = {name: set(re.findall(r'^(?:from|import) (\w+)', (ROOT / f'{name}.py').read_text(), re.M)) & names
               for name in names - {'config'}}
    assert imports['model'] == set() and imports['prepare'] == {'config'} and imports['lora'] == {'config', 'prepare'}
    assert imports['judge'] == {'config'} and imports['train'] == imports['sample'] == {'config', 'prepare', 'model', 'lora'}
    assert imports['export'] == {'config', 'prepare', 'model', 'lora', 'sample', 'judge'}
