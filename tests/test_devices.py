"""Devices that are not here: what a run on the CPU can show of them. See host_tensors.py for what it cannot."""
from types import SimpleNamespace

from config import UserError
from engine import choose_device, for_inference, generate, join_processes
from model import GPT, GPTConfig

import pytest
import torch
from conftest import NO_PICTURE, ROOT, TINY
from host_tensors import HostTensors


def test_a_host_tensor_is_seen():
    """The instrument itself: each of these fails on a GPU."""
    device = torch.device('cpu')
    with HostTensors() as seen:
        x = torch.zeros(3, device=device)
        x + torch.ones(3)
        assert len(seen.mixed) == 1
        torch.where(x > 0, torch.arange(3).float(), x)
        assert len(seen.mixed) == 2
        torch.nn.functional.embedding(torch.tensor([1]), torch.nn.Parameter(torch.ones(2, 3)))
        assert len(seen.mixed) == 3
        (x + torch.ones(3).to(device)) * torch.tensor(2.0)
        assert len(seen.mixed) == 3
        x.double()
        assert seen.doubles


@pytest.mark.parametrize('sampling', [{}, {'temperature': 0.8}, {'temperature': 0.8, 'top_k': 5}])
@pytest.mark.parametrize('precision', ['float32', 'autocast', 'stored in bfloat16'])
def test_generate_computes_on_one_device_without_float64(sampling, precision):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=97, n_layer=2, n_head=2, n_embd=32))
    if precision == 'stored in bfloat16':
        for_inference(model, torch.device('cpu'), torch.bfloat16)
    prompts = [[5, 6, 7] + [i] * (1 + 3 * i) for i in range(8)]
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast'):
        with HostTensors() as seen:
            answers = generate(model, prompts, 20, eos=3, cache_bytes=2e5, **sampling)
        assert not seen.mixed and not seen.doubles and seen.made['device'] > 20
        assert answers == generate(model, prompts, 20, eos=3, cache_bytes=2e5, **sampling)


@pytest.mark.parametrize('flags', [
    (),
    ('--packing=False', '--grad_clip=1.0', '--gradient_accumulation_steps=2', '--loss_on=all'),
    ('--sampled_softmax=100',),
    ('--lora_rank=4',),  # nothing is trained outside the blocks, and the gradients of all are gone when backward ends
    ('--lora_rank=4', '--lora_targets=mlp.c_fc', '--dtype=float16')])
def test_a_run_computes_on_one_device(run, prepared, tmp_path, flags):
    (tmp_path / 'data').symlink_to(prepared / 'data')
    for start in (), ('--init_from=resume', '--max_steps=3'):
        shown = run(ROOT / 'tests/host_tensors.py', ROOT / 'train.py', *TINY, '--dataset=tiny', '--out_dir=a', '--device=cpu', '--eval_iters=1',
                    '--max_steps=2', '--eval_interval=2', '--sample_every_epoch=True', *flags, *start, first=NO_PICTURE).stdout
        assert f'finished step {3 if start else 2}' in shown and "'device': " in shown


@pytest.fixture
def gpu(monkeypatch):
    """As if torch had a GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch, 'empty', lambda *args, **kwargs: SimpleNamespace())


@pytest.mark.parametrize('is_native, expected', [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_never_picks_an_emulated_bfloat16(gpu, monkeypatch, is_native, expected):
    """A T4 says that it supports bfloat16 unless asked without emulation."""
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or is_native)
    device, dtype = choose_device('auto', 'auto')
    assert (device.type, dtype) == ('cuda', expected)


def test_each_process_has_a_gpu_of_its_own(gpu, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '3')
    device, dtype = choose_device('cuda', 'float32')
    assert (device, dtype) == (torch.device('cuda', 3), torch.float32)


def test_auto_without_a_gpu():
    assert choose_device('auto', 'auto') == (torch.device('cpu'), torch.float32)
    assert choose_device('cpu', 'bfloat16') == (torch.device('cpu'), torch.bfloat16)
    assert join_processes(torch.device('cpu')) == (0, 1)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_is_refused_on_mps(gpu, dtype):
    """Causal attention has let positions see later ones there."""
    with pytest.raises(UserError, match=f"dtype='{dtype}' is not safe on mps: set --dtype=float32"):
        choose_device('mps', dtype)
    assert choose_device('mps', 'auto') == (torch.device('mps'), torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_device_that_is_not_here_is_told_in_one_line():
    with pytest.raises(UserError, match="device='cuda' is not available here") as error:
        choose_device('cuda', 'auto')
    assert '\n' not in str(error.value)
