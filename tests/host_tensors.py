"""
Sees, in a run on the CPU, what would fail on a GPU: host tensors in a computation of the device.

    with HostTensors() as seen: ...      # seen.mixed: operations that mixed them; seen.doubles: float64 on the device
    python tests/host_tensors.py train.py --device=cpu ...      # a whole stage; exit 3 if it mixed any

A tensor made with device=..., moved by .to(device), or a parameter counts as one of the device; one made without a
device counts as the host's; what an operation returns is of its arguments' kind. Tensors without dimensions may mix,
as they may on a GPU. It cannot see backward's and the optimizer's kernels, nor what a library does inside.
"""
import runpy
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

MAKERS = {torch.tensor, torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn, torch.randint,
          torch.from_numpy, torch.as_tensor, torch.eye}
JOINS = {torch.stack, torch.cat}  # which take no host scalars beside device tensors
COPIES = {'copy_', '__set__', 'set_', 'from_numpy'}  # between host and device, and so allowed


class HostTensors(TorchFunctionMode):

    def __init__(self):
        super().__init__()
        self.mixed = []  # operations of host tensors and the device's
        self.doubles = []  # operations that gave float64 on the device
        self.made = {'host': 0, 'device': 0}  # how many tensors were made where

    def kind(self, tensor):
        return 'device' if isinstance(tensor, torch.nn.Parameter) else getattr(tensor, 'kind', None)

    def watched(self, hook):
        def call(*args):
            with self:
                hook(*args)
        return call

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', str(func))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # tensors without dimensions may mix
        kinds = {self.kind(tensor) for tensor in inputs if tensor.dim() or func in JOINS} - {None}
        if len(kinds) == 2 and name not in COPIES:
            self.mixed.append(f'{name} of {[(self.kind(tensor), tuple(tensor.shape)) for tensor in inputs]}')
        if name == 'register_post_accumulate_grad_hook':  # backward calls it while no mode is active
            args = args[0], self.watched(args[1])
        result = func(*args, **kwargs)
        if func in MAKERS:
            kind = 'device' if kwargs.get('device') is not None else 'host'
            self.made[kind] += 1
        elif name == 'to' and any(isinstance(arg, torch.device) for arg in (*args, *kwargs.values())):
            kind = 'device'
        elif name in ('cpu', 'numpy'):
            kind = 'host'
        else:
            kind = 'device' if 'device' in kinds else 'host' if 'host' in kinds else None
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter) and kind:
                tensor.kind = kind
                if kind == 'device' and tensor.dtype == torch.float64:
                    self.doubles.append(name)
        return result


if __name__ == '__main__':
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    with HostTensors() as seen:
        runpy.run_path(sys.argv[0], run_name='__main__')
    print(seen.made, *seen.mixed, sep='\n')
    sys.exit(3 if seen.mixed else 0)
