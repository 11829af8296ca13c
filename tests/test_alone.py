"""model.py by itself: copied alone it loads each kind of file and generates; its gradients. And the layout of the repository."""
import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from model import GPT, IGNORE, GPTConfig

import pytest
import torch
from conftest import ROOT
from test_load import write_safetensors
from torch.nn import functional as F

TINY = ROOT / 'tests/fixtures/openai-tiny'
CODE = """
import importlib.util, json, sys
import numpy as np, torch
from model import GPT
tiny, own, huggingface, more = sys.argv[1:]
expected = np.load(f'{tiny}/expected.npz')
prompts = expected['tokens'].tolist()

def answers_of(where):
    model = GPT.from_pretrained(where).eval()
    with torch.no_grad():
        difference = (model(torch.tensor(prompts)) - torch.from_numpy(expected['logits'])).abs().max().item()
    answers = [model.generate(prompt, 20, eos=-1) for prompt in prompts]
    return difference < 5e-5 and answers == expected['greedy'].tolist()

right = {"OpenAI's": answers_of(tiny), 'ours': answers_of(own)}
try:
    GPT.from_pretrained(huggingface)
except ModuleNotFoundError as error:
    said = str(error)
absent = [name for name in ('requests', 'tqdm', 'tiktoken', 'safetensors', 'config', 'prepare', 'pytest')
          if importlib.util.find_spec(name) is None]
sys.path.append(more)
right["Hugging Face's"] = answers_of(huggingface)
print(json.dumps([right, said, absent]))
"""


def required_by(*names):
    """The names of these packages and of all that they require."""
    from packaging.requirements import Requirement
    found = set()
    todo = list(names)
    while todo:
        name = re.sub(r'[-_.]+', '-', todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
                todo.append(requirement.name)
    return found


def link_packages(folder, *names):
    """A folder with links to what these packages are and require."""
    folder.mkdir()
    for name in required_by(*names):
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files} - {'..', '__pycache__'}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution.locate_file(top)))
    return folder


def test_a_copy_loads_each_kind_of_file_and_generates(tmp_path):
    """With torch, numpy and google-crc32c alone; then with safetensors, for Hugging Face's files."""
    folder = tmp_path / 'alone'
    folder.mkdir()
    shutil.copy(ROOT / 'model.py', folder)
    site = link_packages(tmp_path / 'site', 'torch', 'numpy', 'google-crc32c')
    more = link_packages(tmp_path / 'more', 'safetensors')
    model = GPT.from_pretrained(TINY)
    (tmp_path / 'huggingface').mkdir()
    write_safetensors(tmp_path / 'huggingface', model)
    own = tmp_path / 'tiny-sft.pth'
    torch.save(model.state_dict(), own)
    own.with_suffix('.json').write_text(json.dumps({'model': vars(model.config)}))
    env = {key: value for key, value in os.environ.items() if not key.startswith('PYTHON')} | {'PYTHONPATH': str(site)}
    process = subprocess.run([sys.executable, '-S', '-c', CODE, TINY, own, tmp_path / 'huggingface', more], cwd=folder, env=env,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    right, said, absent = json.loads(process.stdout.splitlines()[-1])
    assert right == {"OpenAI's": True, 'ours': True, "Hugging Face's": True}
    assert said == "No module named 'safetensors'"
    assert set(absent) == {'requests', 'tqdm', 'tiktoken', 'safetensors', 'config', 'prepare', 'pytest'}


# --- gradients


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, vocab_size=97, n_layer=3, n_head=4, n_embd=64))


@pytest.mark.parametrize('has_targets', [True, False])
def test_gradients_are_those_of_full_logits(model, has_targets):
    """wte's gradient, as embedding and as output layer, over two micro-batches; with and without targets."""
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[:, :5] = IGNORE
    gradients = []
    for is_plain in False, True:
        other = GPT(model.config).double()
        other.load_state_dict(model.state_dict())
        for row, target in zip(ids, targets):
            if has_targets and not is_plain:
                loss = other(row[None, :-1], target[None])
            else:
                loss = F.cross_entropy(other(row[None, :-1])[0], target)
            loss.backward()
        gradients.append({name: p.grad for name, p in other.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-10, rtol=1e-10, msg=name)


def test_gradients_do_not_depend_on_the_run(model):
    """Several threads add to the same rows of wte, which all prompts share: in the same order every time."""
    ids = torch.randint(9, (8, 60), generator=torch.Generator().manual_seed(0))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    found = []
    for _ in range(10):
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        found.append(model.wte.weight.grad.clone())
    torch.set_num_threads(n_threads)
    assert all(torch.equal(found[0], other) for other in found)


# --- the layout


# a module may import those of earlier lines, anywhere in its code
LAYERS = [['config'], ['model'], ['prepare', 'engine', 'lora'], ['train', 'sample', 'judge'], ['label', 'export', 'serve']]
MODULES = [name for layer in LAYERS for name in layer]


def imports_of(name):
    """The names of our own modules that a module imports, in functions too."""
    path = ROOT / f'{name}.py' if name != 'config' else ROOT / 'config/__init__.py'
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or '').partition('.')[0])
    return found & set(MODULES)


def test_the_top_level_is_the_five_stages_and_what_stands_beside_them():
    assert {path.stem for path in ROOT.glob('*.py')} == set(MODULES) - {'config'}
    assert len(list(ROOT.glob('requirements*.txt'))) <= 3
    assert not list(ROOT.glob('*.html'))


@pytest.mark.parametrize('name', MODULES)
def test_imports_run_one_way(name):
    layer = next(i for i, names in enumerate(LAYERS) if name in names)
    allowed = {other for names in LAYERS[:layer] for other in names}
    assert imports_of(name) <= allowed


def test_model_imports_nothing_of_ours():
    assert imports_of('model') == set()
