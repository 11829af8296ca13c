"""Devices that are not here: what a run on the CPU can show of them. See host_tensors.py for what it cannot."""
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from host_tensors import HostTensors

import config
from model import GPT, GPTConfig


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
@pytest.mark.parametrize('autocast', [False, True])
def test_generate_computes_on_one_device_without_float64(sampling, autocast):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=97, n_layer=2, n_head=2, n_embd=32))
    prompts = [[5, 6, 7] + [i] * (1 + 3 * i) for i in range(8)]
    with HostTensors() as seen, torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        answers = model.generate(prompts, 20, eos=3, cache_bytes=2e5, **sampling)
    assert not seen.mixed and not seen.doubles and seen.made['device'] > 20
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        assert answers == model.generate(prompts, 20, eos=3, cache_bytes=2e5, **sampling)


@pytest.mark.parametrize('flags', [
    (), ('--packing=False', '--grad_clip=1.0'), ('--gradient_accumulation_steps=2', '--loss_on=all'),
    ('--lora_rank=4',),  # nothing is trained outside the blocks, and the gradients of all are gone when backward ends
    ('--lora_rank=4', '--lora_targets=mlp.c_fc', '--dtype=float16')])
def test_a_run_computes_on_one_device(run, prepared, tmp_path, flags):
    (tmp_path / 'data').symlink_to(prepared / 'data')
    shown = run(ROOT / 'tests/host_tensors.py', ROOT / 'train.py', *TINY, '--dataset=tiny', '--out_dir=a', '--device=cpu',
                '--max_steps=3', '--eval_interval=2', '--sample_every_epoch=True', *flags).stdout
    assert 'finished step 3' in shown and "'device': " in shown


@pytest.mark.parametrize('native, expected', [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_never_picks_an_emulated_bfloat16(monkeypatch, native, expected):
    """A T4 says that it supports bfloat16 unless asked without emulation."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch, 'empty', lambda *args, **kwargs: SimpleNamespace())
    device, dtype, rank, world_size = config.init_device('auto', 'auto')
    assert (device.type, dtype, rank, world_size) == ('cuda', expected, 0, 1)


def test_auto_without_a_gpu():
    assert config.init_device('auto', 'auto') == (torch.device('cpu'), torch.float32, 0, 1)
