"""
A start for a small GPT that is to rearrange the words of its prompt: make_demo.py writes it to data/demo_start.pth, and train.py loads it
by init_from like any other model.

What a head needs for copying is there from the start, and a short training only sharpens it. The channels are four blocks of a head's
width: two halves of a token's vector, its position, and the token before it. Token vectors are sums of random codes, for a token's stem,
ending, space, capital and itself, so that `kicked` and ` kick` differ by what all such pairs differ by. For induction (Olsson et al. 2022)
a head of the first layer reads the token before, and two of the second look for where that is the present token. All other heads hand on
what they read (after Trockman and Kolter 2023).
"""
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import GPT, GPTConfig  # noqa: E402
from prepare import EOS, get_tokenizer  # noqa: E402

CONFIG = GPTConfig(block_size=128, n_layer=3, n_head=4, n_embd=160)
SIZE = 0.1 * math.sqrt(2)  # the standard deviation of token and position vectors
SHARES = {'stem': 1.0, 'ending': 0.5, 'space': 0.35, 'capital': 0.35, 'token': 0.6}  # of the codes in a token's vector

ENDINGS = 'ing', 'ies', 'ied', 'est', 'er', 'es', 'ed', 'ly', 's', 'd', 'y', 'e'
ALIKE = {'ies': 's', 'es': 's', 'ied': 'ed', 'd': 'ed'}  # endings of the same meaning


def parts_of(token):
    """A token's text -> (stem, ending, whether a space comes first, whether a capital does)."""
    word = token.strip(' ')
    if not (word.isascii() and word.isalpha()):
        return token, '', False, False
    stem = word.lower()
    ending = next((end for end in ENDINGS if stem.endswith(end) and len(stem) - len(end) >= 3), '')
    stem = stem.removesuffix(ending)
    is_doubled = len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in 'lsz'
    if ending in ('ing', 'ed', 'er', 'est') and is_doubled:
        stem = stem[:-1]  # stopped: stop
    return stem, ALIKE.get(ending, ending), token[0] == ' ', word[0].isupper()


def token_vectors(width):
    """The vectors (EOS + 1, width) of all tokens: sums of the codes of their parts."""
    tokenizer = get_tokenizer()
    total = math.sqrt(sum(share**2 for share in SHARES.values()))
    number_of = {}  # of each part, in the order in which they are met
    numbers = []
    for id in range(EOS + 1):
        text = '<end>' if id == EOS else tokenizer.decode_single_token_bytes(id).decode(errors='replace')
        parts = zip(SHARES, (*parts_of(text), id))
        numbers.append([number_of.setdefault(part, len(number_of)) for part in parts])
    codes = torch.randn(len(number_of), width)
    vectors = torch.zeros(EOS + 1, width)
    for share, part_numbers in zip(SHARES.values(), torch.tensor(numbers).T):
        vectors += SIZE * share / total * codes[part_numbers]
    return vectors


@torch.no_grad()
def init_for_copying(model):
    """Give a GPT of four heads and at least two layers the weights that the docstring above describes."""
    C = model.config.n_embd
    d = C // model.config.n_head
    model.wte.weight.zero_()[:EOS + 1, :2 * d] = token_vectors(2 * d)

    # positions: pairs of a sine and a cosine, most frequencies at random, so that no two places are alike
    frequency = torch.cat((torch.rand(d // 2 - 4) * math.pi, torch.tensor([0.03, 0.07, 0.15, 0.3])))
    angle = torch.arange(model.config.block_size)[:, None] * frequency
    pairs = torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)
    model.wpe.weight.zero_()[:, 2 * d:3 * d] = SIZE * math.sqrt(2) * pairs

    # the matrices as views: what a head reads for its q, k, v from each block of channels, and to which it writes
    POSITION, BEFORE = 2, 3
    one = torch.eye(d)
    reads = [block.attn.c_attn.weight.view(3, 4, d, 4, d) for block in model.h]
    writes = [block.attn.c_proj.weight.normal_(std=0.02).view(4, d, 4, d) for block in model.h]
    q, k, v = range(3)
    for read, write in zip(reads, writes):
        for head in range(4):
            # each head reads one half of a token and writes it there again
            half = head % 2
            read[v, head, :, half] += one
            write[half, :, head] += one

    # first layer, first head: the query is turned by a step, so that it meets the key of the place before
    turns = [torch.tensor([[f.cos(), -f.sin()], [f.sin(), f.cos()]]) for f in frequency]
    read = reads[0][:, 0]
    write = writes[0][:, :, 0]
    read.zero_()
    write.zero_()
    read[q, :, POSITION] = 1.4 * torch.block_diag(*turns)
    read[k, :, POSITION] = 1.4 * one
    read[v, :, 0] = one
    write[BEFORE] = one

    # second layer, first two heads: the present token is looked for among those before
    read = reads[1][:, :2]
    read[[q, k]] = 0
    read[q, :, :, 0] = 1.4 * one
    read[k, :, :, BEFORE] = 1.4 * one


def write_start_model(path, seed=123):
    """Write the model as a state dict, and its shape beside it."""
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    init_for_copying(model)
    torch.save(model.state_dict(), path)
    path.with_suffix('.json').write_text(json.dumps({'model': asdict(CONFIG)}))
    print(f'{path}: a GPT of {sum(p.numel() for p in model.parameters()):,} parameters')
