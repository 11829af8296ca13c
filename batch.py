"""
Rows become a batch: dynamic padding, or packing that is the same function of the weights in half the positions.

    ids, targets, positions, segments = make_batch(read_split('demo', 'train'), [3, 1, 4], packing=True)
"""
import numpy as np

from config import UserError

IGNORE = -100  # a target that is not supervised


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
