"""
Rows become a batch: dynamic padding, or packing, and the attention that makes it the same function of the weights.

    ids, targets, positions, segments = make_batch(read_split('demo', 'train'), [3, 1, 4], packing=True)
"""
import functools

import numpy as np
import torch
from torch.nn import functional as F

from config import UserError

IGNORE = -100  # a target that is not supervised
PART = 64  # positions, at least, whose attention is computed at once on a CPU


def first_targets(meta, loss_on):
    """-> absolute offset of each row's first supervised id, for loss_on 'answer', 'response' (the header too) or 'all'."""
    if loss_on == 'answer':
        return meta['answer']
    elif loss_on == 'response':
        return meta['header']
    elif loss_on == 'all':
        return meta['start'] + 1
    raise UserError(f"loss_on={loss_on!r} is none of 'answer', 'response', 'all'")


def make_batch(data, numbers, packing=True, loss_on='answer', block_size=1024):
    """
    data (of read_split), row numbers -> int64 arrays ids, targets, positions, segments, each (B, T), right-padded to the
    longest row. targets are shifted by one; IGNORE on what loss_on leaves out ('answer', 'response', 'all') and on pads.
    Without packing a row is an example, in segment 0. With it a row holds the shared prefix once (segment 0), then as
    many examples as fit (segments 1..n), their positions going on from the prefix. Pads are of segment -1.
    """
    ids, meta = data
    numbers = np.asarray(numbers)
    start, end = meta['start'][numbers], meta['end'][numbers]
    first = first_targets(meta, loss_on)[numbers]
    # the prefix is shared only as far as nothing of it is supervised: the id before the first target predicts it
    shared = min(meta['shared_prefix'], (first - start).min() - 1) if packing else 0
    lengths = end - start - 1 - shared
    if packing:
        # no more rows than needed, of about equal length: the longest example goes first, each into the shortest row so far
        count = -(-lengths.sum() // max(1, block_size - shared))
        while True:
            bins = [[shared, []] for _ in range(count)]  # length, examples
            for i in np.argsort(-lengths, kind='stable'):
                place = min(bins, key=lambda row: row[0])
                place[0] += lengths[i]
                place[1].append(i)
            if count >= len(numbers) or max(length for length, _ in bins) <= block_size:
                break
            count += 1
    else:
        bins = [[length, [i]] for i, length in enumerate(lengths)]
    B, T = len(bins), max(length for length, _ in bins)
    x, y = np.full((B, T), meta['eos']), np.full((B, T), IGNORE)
    positions, segments = np.zeros((B, T), dtype=np.int64), np.full((B, T), -1)
    for b, (_, examples) in enumerate(bins):
        t = shared
        x[b, :t], positions[b, :t], segments[b, :t] = ids[start[examples[0]]:][:t], np.arange(t), 0
        for segment, i in enumerate(examples, 1):
            row = ids[start[i] + shared:end[i]].astype(np.int64)
            span = slice(t, t + len(row) - 1)
            x[b, span], segments[b, span] = row[:-1], segment if packing else 0
            positions[b, span] = np.arange(shared, shared + len(row) - 1)
            skip = first[i] - start[i] - shared - 1
            y[b, span][skip:] = row[1:][skip:]
            t = span.stop
    return x, y, positions, segments


def cut(segments):
    """
    segments of a row (T,) -> how many positions at its beginning are of segment 0, which all see; and the sizes of its
    parts, each of whole segments, and but for the last of PART positions or more.
    """
    segments, T = np.asarray(segments), len(segments)
    P = int(np.argmax(segments != 0)) if segments.any() else T
    _, number = np.unique(segments, return_inverse=True)
    last = np.zeros(T, dtype=int)
    last[number] = np.arange(T)  # of a segment's positions, the last is kept
    open_to = np.maximum.accumulate(np.where(segments == 0, T - 1, last[number])[P:])  # a 0 behind P is seen by all after it
    sizes, begin = [], 0
    for end in (np.flatnonzero(open_to == np.arange(P, T)) + P + 1).tolist():
        if end == T or end - begin >= PART:
            sizes.append(end - begin)
            begin = end
    return P, sizes or [T]


def packed_attention(segments, dropout=0.0):
    """
    segments (B, T) -> attend(q, k, v), each (B, H, T, C/H): a query sees the keys before it of its own segment and of
    segment 0. A mask saves no time, so on a CPU rows are cut between segments; elsewhere all are computed in one call.
    """

    def seen(own, keys):  # (B, queries) and (B, keys), the last of which are the queries' own
        keys = keys[:, None]
        return ((own[:, :, None] == keys) | (keys == 0)).tril(keys.size(2) - own.size(1))[:, None]

    if segments.device.type != 'cpu' or torch.compiler.is_compiling():
        return functools.partial(F.scaled_dot_product_attention, attn_mask=seen(segments, segments), dropout_p=dropout)
    sizes, parts = [], []  # of all rows; a part: its row's first one, how much of that it sees, its mask
    for row in segments:
        P, of_row = cut(row.numpy())
        first = len(sizes)
        for i, own in enumerate(row.split(of_row), first):
            far = P if i > first else 0
            parts.append((first, far, seen(own[None], torch.cat((row[:far], own))[None])))
        sizes += of_row

    def attend(*qkv):
        # (n, H, C/H) a part: a whole piece of memory
        q, k, v = (x.transpose(1, 2).flatten(0, 1).split(sizes) for x in qkv)
        y = []
        for i, (first, far, mask) in enumerate(parts):
            sees = [torch.cat((x[first][:far], x[i])) for x in (k, v)]
            q_k_v = (x.transpose(0, 1)[None] for x in (q[i], *sees))
            y.append(F.scaled_dot_product_attention(*q_k_v, attn_mask=mask, dropout_p=dropout)[0].transpose(0, 1))
        return torch.cat(y).unflatten(0, segments.shape).transpose(1, 2)

    return attend
