"""
Where weights come from: the released ones, downloaded once, and files of OpenAI's, Hugging Face's or our own.

    path = fetch_released('gpt2-medium')           # in the cache: OpenAI's files, or Hugging Face's
    path = find_checkpoint('out/my-run')           # or a folder or file at hand
    fields, tensors = read_checkpoint(path)        # for GPTConfig; (name, tensor) pairs in GPT's names and shapes
"""
import os
import re
from pathlib import Path

import torch

from bundle import read_openai
from config import UserError
from files import download, read_json, unreadable

OPENAI = ('https://openaipublic.blob.core.windows.net/gpt-2/models',
          'https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2')
HUGGING_FACE = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/') + '/openai-community'
# block_size, vocab_size, n_layer, n_head, n_embd; OpenAI's folder, bytes of data and index; Hugging Face's bytes and sha256,
# where they are known
RELEASED = {
    'gpt2': ((1024, 50257, 12, 12, 768), '124M', 497_759_232, 5_215,
             548_105_171, '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
    'gpt2-medium': ((1024, 50257, 24, 16, 1024), '355M', 1_419_292_672, 10_399,
                    0, 'fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd'),
    'gpt2-large': ((1024, 50257, 36, 20, 1280), '774M', 3_096_120_320, 15_535, 0, ''),
    'gpt2-xl': ((1024, 50257, 48, 25, 1600), '1558M', 6_230_444_800, 20_724, 0, ''),
}


def fetch_released(name, cache_dir='', weights='openai'):
    """A name of RELEASED -> OpenAI's index or Hugging Face's safetensors in the cache, downloaded unless it is there."""
    _, folder, data, index, size, sha256 = RELEASED[name]
    cache = Path(cache_dir or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'gpt2-sft'), name).expanduser()
    sizes = {'hparams.json': 0, 'model.ckpt.index': index, 'model.ckpt.data-00000-of-00001': data}

    def openai():
        for file in sizes:
            download([f'{base}/{folder}/{file}' for base in OPENAI], cache / file, sizes[file])
        return cache / 'model.ckpt.index'

    def huggingface():
        return download([f'{HUGGING_FACE}/{name}/resolve/main/model.safetensors'], cache / 'model.safetensors', size, sha256)

    ways = [openai, huggingface]
    fell_back = (cache / 'model.safetensors').exists() and not all((cache / file).exists() for file in sizes)
    if weights == 'huggingface' or fell_back:
        ways.reverse()
    try:
        return ways[0]()
    except UserError as first:
        print(f'{first}; trying {ways[1].__name__}', flush=True)
        try:
            return ways[1]()
        except UserError as second:
            raise UserError(f'{first}; {second}') from second


def find_checkpoint(where):
    """A path -> the file that read_checkpoint takes; in a folder the newest of our own, else OpenAI's, else safetensors."""
    path = Path(where).expanduser()
    if path.is_file():
        return path
    for patterns in ('ckpt.pt', '*-sft.pth'), ('*.index',), ('*.safetensors.index.json',), ('*.safetensors',):
        found = [file for pattern in patterns for file in path.glob(pattern)]
        if found:
            return max(found, key=os.path.getmtime)
    fault = 'holds no ckpt.pt, *-sft.pth, model.ckpt.index or *.safetensors' if path.is_dir() else 'is no file or folder'
    raise UserError(f'{where} {fault}; a model is {", ".join(RELEASED)}, or the path to one')


def read_checkpoint(path):
    """-> (GPTConfig's fields, (name, tensor) pairs in GPT's names and shapes, memory-mapped). Raises UserError."""
    if path.suffix == '.index':
        hparams = path.with_name('hparams.json')
        tensors = ((name, as_linear(name, torch.from_numpy(array))) for name, array in read_openai(path))
        return read_config(hparams, read_json(hparams)), tensors
    if path.name.endswith(('.safetensors', '.safetensors.index.json')):
        fields, tensors = read_safetensors(path)
    elif path.suffix in ('.pt', '.pth'):
        fields, tensors = read_own(path)
    else:
        raise UserError(f'{path} is no *.pth, *.pt, *.index or *.safetensors; a model is {", ".join(RELEASED)}, or a path')
    return read_config(path, fields, tensors), tensors.items()


def read_config(path, fields, tensors=None):
    """Fields in our, OpenAI's or Hugging Face's names; without any, tensors tell, heads are 64 wide -> GPTConfig's."""
    ours = {'n_ctx': 'block_size', 'n_positions': 'block_size', 'n_vocab': 'vocab_size'}
    try:
        fields = {ours.get(key, key): value for key, value in fields.items()}
        if not fields and tensors:
            fields['vocab_size'], fields['n_embd'] = tensors['wte.weight'].shape
            fields |= {'block_size': len(tensors['wpe.weight']), 'n_head': fields['n_embd'] // 64}
            fields['n_layer'] = 1 + max(int(name.split('.')[1]) for name in tensors if name.startswith('h.'))
        fields = {key: int(fields[key]) for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')}
        if min(fields.values()) < 1 or fields['n_embd'] % fields['n_head']:
            raise ValueError(f'{fields["n_head"]} heads in a width of {fields["n_embd"]}')
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise unreadable(path, f'it does not tell the shapes of a GPT-2 ({error})') from error
    return fields


def as_linear(name, tensor):
    """OpenAI and Hugging Face store layers (in, out) -> the (out, in) view. No shape shows it: attn.c_proj is square."""
    return tensor.t() if '.c_' in name and name.endswith('weight') and tensor.dim() == 2 else tensor


def read_own(path):
    """A run's ckpt.pt, or a plain state dict with its .json beside it -> (fields of its GPTConfig, {name: tensor})."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # torch.load tells of no error in particular
        raise unreadable(path, str(error).split('. ')[0]) from error
    tensors = saved.get('model', saved) if isinstance(saved, dict) else {}
    if not tensors or not all(map(torch.is_tensor, tensors.values())):
        raise unreadable(path, 'it holds no state dict')
    fields, beside = saved.get('model_config', {}), path.with_suffix('.json')
    if not fields and beside.exists():
        fields = read_json(beside).get('model', {})
    return fields, tensors


def read_safetensors(path):
    """One file or the index of several, names with or without transformer. -> (config.json or {}, {name: tensor})."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f'{path} needs safetensors: pip install safetensors') from error
    tensors, shards = {}, {'': path.name}
    if path.suffix == '.json':
        shards = read_json(path).get('weight_map')
        if not isinstance(shards, dict) or not all(isinstance(name, str) and name for name in shards.values()):
            raise unreadable(path, 'its weight_map is not one of tensors and files')
    for file in sorted({path.with_name(name) for name in shards.values()}):
        try:
            with safe_open(file, 'pt') as opened:
                tensors |= {name.removeprefix('transformer.'): opened.get_tensor(name) for name in opened.keys()}
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error
    # the masks of causal attention are no weights
    tensors = {name: as_linear(name, tensor) for name, tensor in tensors.items()
               if not re.fullmatch(r'h\.\d+\.attn\.(masked_)?bias', name)}
    head = tensors.pop('lm_head.weight', None)
    if head is not None and not torch.equal(head, tensors.get('wte.weight', head)):
        raise UserError(f'{path}: lm_head.weight differs from wte.weight; in a GPT-2 they are one tensor')
    beside = path.with_name('config.json')
    fields = read_json(beside) if beside.exists() else {}
    # what Hugging Face's GPT-2 may vary and this one does not
    fixed = {'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
             'scale_attn_by_inverse_layer_idx': False}
    for key, value in fixed.items():
        if fields.get(key, value) != value:
            raise UserError(f'{beside}: {key} is {fields[key]!r}, and {value!r} in GPT-2 as it is here')
    return fields, tensors
