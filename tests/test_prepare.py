"""Rows to token files: the template, offsets, splits, truncation, files that are whole or not there."""
import itertools
import json
import os
import random
import re
import shutil
import threading
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import prepare
from config import UserError, sha256_of
from prepare import (
    EOS,
    SPLITS,
    encode_prompt,
    encode_row,
    format_prompt,
    get_tokenizer,
    header_start,
    read_split,
    split_rows,
)

import numpy as np
import pytest
from conftest import ROOT, ROWS, stage
from test_rows import PLAIN, figures, splits_of, write


def all_rows(data):
    """(ids, header, answer, split) of every row of data/tiny, offsets counted from the row's start."""
    for split in SPLITS:
        ids, meta = data(split)
        for start, header, answer, end in zip(meta['start'], meta['header'], meta['answer'], meta['end']):
            yield ids[start:end].tolist(), header - start, answer - start, split


# --- a row


def test_the_template_is_alpacas():
    row = {'instruction': 'Add.', 'input': '1 2', 'output': '3'}
    assert format_prompt(row) == (
        'Below is an instruction that describes a task. Write a response that appropriately completes the request.'
        '\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n')


def test_an_input_that_is_empty_or_missing_leaves_no_trace():
    bare = format_prompt({'instruction': 'Add.'})
    assert bare == format_prompt({'instruction': 'Add.', 'input': ''}) == format_prompt({'instruction': 'Add.', 'input': None})
    assert '### Input' not in bare


def test_a_row_is_its_prompt_its_answer_and_one_end_of_text(data):
    tokenizer = get_tokenizer()
    by_prompt = {tuple(tokenizer.encode_ordinary(format_prompt(row))): row for row in ROWS}
    rows = list(all_rows(data))
    assert len(rows) == len(ROWS)
    for ids, header, answer, _ in rows:
        row = by_prompt[tuple(ids[:answer])]  # the prompt's ids are an exact prefix of the training ids
        assert ids[:answer] == encode_prompt(row)
        assert ids[answer:-1] == tokenizer.encode_ordinary(row['output'])
        assert tokenizer.decode(ids[answer:]) == row['output'] + '<|endoftext|>'
        assert ids.index(EOS) == len(ids) - 1  # also where the text holds a literal <|endoftext|>
        text = tokenizer.decode(ids[header:answer])
        assert text.endswith('\n\n### Response:\n') and not text[:-16].strip()  # white space before it may have merged
        if not row['instruction'][-1].isspace() or row.get('input'):
            assert text == '\n\n### Response:\n'


def test_a_prompt_has_the_ids_of_its_text():
    """Though what all prompts begin with is encoded once; and the header is found whatever merged before it."""
    words = ['a', 'b c', ' ', '\n', '\n\n', '\t', ':', "'s", '12', '###', 'é', '日本', '🎉', '<|endoftext|>', '\u2028', '.', 'I', '\ud83d', '\x00']
    draw = random.Random(0)
    tokenizer = get_tokenizer()
    for _ in range(400):
        row = {name: ''.join(draw.choices(words, k=draw.randint(least, 6))) for name, least in (('instruction', 1), ('input', 0), ('output', 0))}
        prompt = tokenizer.encode_ordinary(format_prompt(row))
        ids, header, answer = encode_row(row, 1024)
        assert ids == [*prompt, *tokenizer.encode_ordinary(row['output']), EOS]
        assert answer == len(prompt) and header == header_start(prompt)
        assert tokenizer.decode(ids[header:answer]).endswith('\n\n### Response:\n')
        assert '\n\n### Response:\n' not in tokenizer.decode(ids[header + 1:answer])


def test_the_header_is_found_in_a_template_of_ones_own(monkeypatch):
    """format_prompt is all that changes: the rest is found from what it returns."""
    monkeypatch.setattr(prepare, 'RESPONSE_HEADER', '\n<answer>')
    prompt = get_tokenizer().encode_ordinary('<question>\nAdd 1 and 2.\n<answer>')
    assert get_tokenizer().decode(prompt[header_start(prompt):]) == '\n<answer>'


def test_an_answer_that_passes_the_block_size_is_cut_and_has_no_end():
    row = {'instruction': 'Say it.', 'output': 'one two three four five'}
    whole, header, answer = encode_row(row, 1024)
    assert encode_row(row, len(whole)) == (whole, header, answer)
    for block_size in range(answer + 1, len(whole)):
        ids, *_ = encode_row(row, block_size)
        assert ids == whole[:block_size] and EOS not in ids
    assert encode_row(row, answer) is None  # the prompt leaves no room


# --- the files


def test_what_the_files_of_a_split_hold(prepared, data):
    for split in SPLITS:
        meta = json.loads((prepared / 'data/tiny' / f'{split}.json').read_text())
        size = (prepared / 'data/tiny' / f'{split}.bin').stat().st_size
        assert (meta['format'], meta['split'], meta['eos'], meta['tokenizer']) == (1, split, EOS, 'gpt2')
        assert size == 2 * meta['tokens']
        assert meta['examples'] == len(meta['start']) == len(meta['answer'])
        assert ('rows' in meta) == (split != 'train')
        assert len(meta['sha256']) == 64
        assert (meta['source'], meta['split_seed'], meta['config']['block_size']) == ('rows.json', 123, 128)
    ids, _ = data('train')
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16
    # what all prompts begin with, an id of each row left aside
    rows = [ids[:answer] for ids, _, answer, _ in all_rows(data)]
    shared = os.path.commonprefix(rows)
    assert data('val').meta['shared_prefix'] == len(shared) == min(len(shared), min(map(len, rows)) - 1)


def test_token_files_of_another_version_are_refused(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared / 'data', tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'data/tiny/val.json'
    meta = json.loads(path.read_text())
    no_answer = {'answer': meta['start'][1:] + [meta['tokens']]}  # rows with nothing to learn
    for change in {'format': 2}, {'format': 3}, {'template': 'other'}, {'tokens': 1}, no_answer:
        path.write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match='prepare the data again'):
            read_split('tiny', 'val')
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match='cannot read data/tiny/val.json'):
        read_split('tiny', 'val')
    path.unlink()
    with pytest.raises(UserError, match='run: python prepare.py --dataset=tiny'):
        read_split('tiny', 'val')


@pytest.fixture
def encoded(tmp_path, monkeypatch):
    """The table of ROWS and of others of a second file, which are read and encoded in tmp_path/part."""
    write(tmp_path / 'a.json', ROWS + PLAIN)
    write(tmp_path / 'b.jsonl', [{'instruction': f'Q {i}', 'output': 'A'} for i in range(40)])
    (tmp_path / 'part').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, 'block_size', 80)
    sources = {name: tmp_path / name for name in ('a.json', 'b.jsonl')}
    return prepare.encode_sources(sources, tmp_path / 'part', Counter(), set())[0]


def test_a_large_split_has_its_offsets_and_rows_beside_it_and_reads_alike(run, encoded, tmp_path):
    some = encoded[5:]
    for dataset, many in ('small', 1000), ('large', 5):
        folder = tmp_path / 'data' / dataset
        folder.mkdir(parents=True)
        for split in SPLITS:
            meta = {'template': prepare.TEMPLATE, 'source': 'a.json,b.jsonl', 'eos': EOS}
            # write_split reads what encode_sources wrote beside it
            prepare.write_split(tmp_path / 'part', split, some, meta, many)
        for path in (tmp_path / 'part').glob('*.*'):
            path.rename(folder / path.name)
    for split in SPLITS:
        small = read_split('small', split)
        large = read_split('large', split)
        text = (tmp_path / f'data/large/{split}.json').read_text()
        assert '"start"' not in text and '"rows"' not in text and json.loads(text)['format'] == 2
        assert small.ids.tobytes() == large.ids.tobytes()
        assert small.meta.get('rows') == large.meta.get('rows')
        for name in 'start', 'header', 'answer', 'source_of', 'end':
            assert np.array_equal(small.meta[name], large.meta[name])
    assert read_split('large', 'test', n_rows=2).meta['rows'] == small.meta['rows'][:2]
    # a small split that replaces a large one leaves no file of it
    run('prepare.py', '--source=a.json,b.jsonl', '--dataset=large')
    assert sorted(file.name for file in (tmp_path / 'data/large').iterdir()) == sorted(f'{s}.{e}' for s in SPLITS for e in ('bin', 'json'))


def test_a_lone_surrogate_is_no_fault(run, tmp_path):
    write(tmp_path / 'rows.json', [{'instruction': f'Task {i}', 'output': '\ud83d'} for i in range(40)])
    run('prepare.py', '--source=rows.json', '--dataset=x')


def test_the_tokenizer_needs_no_network(tmp_path):
    """Every connection refused, and no cache of tiktoken's: the ids are GPT-2's."""
    code = ('import socket, sys; sys.path.insert(0, sys.argv[1])\n'
            'def refuse(*args, **kwargs): raise OSError("no network")\n'
            'socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n'
            'from prepare import get_tokenizer\n'
            'print(get_tokenizer().encode_ordinary("Hello, world! <|endoftext|>"))')
    shown = stage(tmp_path, '-c', code, str(ROOT), env={'TIKTOKEN_CACHE_DIR': str(tmp_path)}).stdout
    assert json.loads(shown) == [15496, 11, 995, 0, 1279, 91, 437, 1659, 5239, 91, 29]


def peak_memory(folder, monkeypatch, n_rows, between):
    """(the most bytes that Python held while the stage ran, the bytes of its file) of rows of 2 KB, most of it a field of the user's."""
    rows = (json.dumps({'instruction': f'Task {i}', 'output': 'word ' * 20, 'more': 'x' * 2000}) for i in range(n_rows))
    (folder / 'rows.json').write_text('[' + between.join(rows) + ']')
    settings = {'source': 'rows.json', 'dataset': f'x{n_rows}', 'train_share': 0.99, 'test_share': 0.005}
    for name, value in settings.items():
        monkeypatch.setattr(prepare, name, value)
    encode_row(PLAIN[0], 1024)  # loads the tokenizer, which is not of the rows
    tracemalloc.start()
    prepare.main()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, (folder / 'rows.json').stat().st_size


@pytest.mark.parametrize('between', [
    ',\n', ', '], ids=['a row a line', 'a single line'])
def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch, between):
    monkeypatch.chdir(tmp_path)
    few, _ = peak_memory(tmp_path, monkeypatch, 1_000, between)
    many, size = peak_memory(tmp_path, monkeypatch, 4_000, between)
    assert many - few < 1.5e6 < size / 5


# --- splits


def plain_split(keys, seed, n_train, n_test):
    """What split_rows promises, without numpy."""
    sizes = {'train': n_train, 'test': n_test, 'val': len(keys) - n_train - n_test}
    groups = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    groups = list(groups.values())
    random.Random(seed).shuffle(groups)
    splits = {split: [] for split in sizes}
    for group in groups:
        for split in 'train', 'test', 'val', 'train':
            if len(splits[split]) + len(group) <= sizes[split]:
                break
        splits[split] += group
    return splits


@pytest.mark.parametrize('seed', [123, 7])
@pytest.mark.parametrize('n_keys', [3, 60, 1000])
def test_splits_are_a_shuffle_of_groups(seed, n_keys):
    keys = np.random.default_rng(0).integers(0, n_keys, 500)
    found = split_rows(keys, seed, 425, 50)
    assert {split: numbers.tolist() for split, numbers in found.items()} == plain_split(keys.tolist(), seed, 425, 50)


def test_splits_keep_equal_prompts_together(run, tmp_path):
    rows = [{'instruction': f'Task {i % 70}', 'input': '', 'output': str(i)} for i in range(100)]
    write(tmp_path / 'rows.json', rows)
    shown = run('prepare.py', '--source=rows.json', '--dataset=x').stdout
    splits = splits_of(tmp_path, 'x')
    assert [splits[split][1]['examples'] for split in SPLITS] == figures(shown, 'rows') == [85, 5, 10]
    held = {row['instruction'] for split in ('val', 'test') for row in splits[split][1]['rows']}
    train = get_tokenizer().decode(np.frombuffer(splits['train'][0], '<u2').tolist())
    assert not [text for text in held if f'{text}\n' in train]
    assert figures(shown, 'prompts also in train') == [0, 0, 0]
    # another seed, another split; the same seed, the same bytes
    run('prepare.py', '--source=rows.json', '--dataset=x', '--split_seed=7')
    assert splits_of(tmp_path, 'x')['train'][0] != splits['train'][0]
    run('prepare.py', '--source=rows.json', '--dataset=x')
    assert splits_of(tmp_path, 'x')['train'][0] == splits['train'][0]
    # the file's own order, and what straddles it
    shown = run('prepare.py', '--source=rows.json', '--dataset=x', '--split_seed=-1').stdout
    assert splits_of(tmp_path, 'x')['test'][1]['rows'] == rows[85:95]
    assert figures(shown, 'prompts also in train') == [0, 5, 10]


def test_prompts_that_differ_in_form_alone_stay_together(run, tmp_path):
    rows = []
    for i in range(80):
        forms = f'Write the number {i}.', f'write  the number {i}', f'Write, the NUMBER {i}!\n'
        rows += [{'instruction': form, 'input': '', 'output': f'{i} {n if i % 2 else ""}'} for n, form in enumerate(forms)]
    random.Random(1).shuffle(rows)
    write(tmp_path / 'rows.json', rows + rows[:5])
    shown = run('prepare.py', '--source=rows.json', '--dataset=x').stdout
    assert 'left out: 5 rows: they equal others' in shown
    splits = splits_of(tmp_path, 'x')
    held = {split: {re.search(r'\d+', row['instruction'])[0] for row in splits[split][1]['rows']} for split in ('val', 'test')}
    assert not held['val'] & held['test']
    assert figures(shown, 'rows') == [204, 12, 24]
    train = get_tokenizer().decode(np.frombuffer(splits['train'][0], '<u2').tolist())
    for number in held['val'] | held['test']:
        assert not re.search(f'number {number}[.!\n]', train, re.IGNORECASE)


def test_answers_that_stand_in_train_too_are_counted(run, tmp_path):
    for outputs, expected in (([f' {i % 30} ' for i in range(100)], [0, 5, 10]), ([str(min(i, 90)) for i in range(100)], [0, 0, 0])):
        write(tmp_path / 'rows.json', [{'instruction': f'Task {i}', 'output': output} for i, output in enumerate(outputs)])
        shown = run('prepare.py', '--source=rows.json', '--dataset=x', '--split_seed=-1').stdout
        assert figures(shown, 'answers also in train') == expected


def test_what_is_cut_and_dropped_is_counted(run, tmp_path):
    long = ' and so on' * 40
    rows = [{'instruction': f'Task {i}', 'input': '', 'output': 'x'} for i in range(60)]
    rows[3]['output'] += long  # cut
    rows[5]['instruction'] += long  # dropped
    rows[7]['output'] = ''  # learns to end at once
    prompt = {'instruction': 'Say' + ' on' * (63 - len(encode_prompt({'instruction': 'Say'}))), 'input': ''}
    rows[9] = prompt | {'output': 'two tokens'}  # cut behind the first
    rows[5]['output'] = rows[52]['output'] = 'only here'  # of which train has none
    write(tmp_path / 'rows.json', rows)
    shown = run('prepare.py', '--source=rows.json', '--dataset=x', '--block_size=64', '--split_seed=-1').stdout
    assert figures(shown, 'truncated') == [2, 0, 0]
    assert figures(shown, 'dropped') == [1, 0, 0]
    assert figures(shown, 'empty answers') == [1, 0, 0]
    assert figures(shown, 'answers also in train') == [0, 3, 5]
    assert '[[' in shown and ']]' in shown
    bin, meta = splits_of(tmp_path, 'x')['train']
    ids = np.frombuffer(bin, '<u2')
    ends = meta['start'][1:] + [len(ids)]
    assert meta['examples'] == 50
    assert max(end - start for start, end in zip(meta['start'], ends)) == 64
    assert [i for i, end in enumerate(ends) if ids[end - 1] != EOS] == [3, 8]  # a cut answer did not end there


def test_files_of_ones_own_for_val_and_test(run, tmp_path):
    """They are taken whole, the rest is split by the shares; a row that equals one of the source is not in test."""
    rows = [{'instruction': f'Task {i}', 'input': '', 'output': str(i)} for i in range(60)]
    write(tmp_path / 'train.json', rows[:40])
    write(tmp_path / 'val.csv', rows[40:45])
    (tmp_path / 'val.csv').write_text('prompt,completion\n' + '\n'.join(f'{row["instruction"]},{row["output"]}' for row in rows[40:45]))
    write(tmp_path / 'test.jsonl', rows[45:60] + rows[:2])
    shown = run('prepare.py', '--source=train.json', '--val_source=val.csv', '--test_source=test.jsonl', '--dataset=x').stdout
    assert figures(shown, 'rows') == [40, 5, 15]
    assert 'left out: 2 rows: they equal others' in shown
    splits = splits_of(tmp_path, 'x')
    assert [row['instruction'] for row in splits['val'][1]['rows']] == [row['instruction'] for row in rows[40:45]]
    assert [row['instruction'] for row in splits['test'][1]['rows']] == [row['instruction'] for row in rows[45:60]]
    assert splits['train'][1]['source'] == 'train.json | val.csv | test.jsonl'
    # with a test of one's own, train and val share the rest
    shown = run('prepare.py', '--source=train.json', '--test_source=test.jsonl', '--dataset=y').stdout
    assert figures(shown, 'rows') == [38, 2, 15]
    shown = run('prepare.py', '--source=train.json', '--val_source=val.csv', '--dataset=z').stdout
    assert figures(shown, 'rows') == [36, 5, 4]
    for name in 't*n.json', './train.json':
        said = run('prepare.py', '--source=train.json', f'--test_source={name}', '--dataset=w', code=2).stderr
        assert f'test_source names a file that another split has: {name}' in said


def test_a_name_that_looks_like_a_pattern_is_a_file_first(run, tmp_path):
    write(tmp_path / 'rows[1].json', PLAIN[:30])
    write(tmp_path / 'rows1.json', PLAIN[:40])
    assert sum(figures(run('prepare.py', '--source=rows[1].json', '--dataset=x').stdout, 'rows')) == 30


@pytest.fixture
def website():
    """A server with .files {path: bytes}, and .asked, the paths that were asked for; .url."""
    class Handler(BaseHTTPRequestHandler):

        def log_message(self, *_):
            pass

        def do_GET(self):
            website.asked.append(self.path)
            body = website.files.get(self.path, b'')
            self.send_response(200 if body else 404)
            self.send_header('Content-Length', len(body))
            self.end_headers()
            self.wfile.write(body)

    website = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    website.files = {}
    website.asked = []
    website.url = f'http://127.0.0.1:{website.server_port}'
    thread = threading.Thread(target=website.serve_forever, args=(0.01,))
    thread.start()
    yield website
    website.shutdown()
    website.server_close()
    thread.join()


def test_a_source_on_the_web(run, tmp_path, website):
    """It is downloaded once, and read like a file of its content, whatever its address is called."""
    website.files['/rows?raw=1'] = b'instruction,output\n' + b''.join(b'What is %d?,%d\n' % (i, i) for i in range(60))
    for _ in range(2):
        run('prepare.py', f'--source={website.url}/rows?raw=1', '--dataset=web', '--block_size=128')
        assert website.asked == ['/rows?raw=1']
    assert json.loads((tmp_path / 'data/web/train.json').read_text())['source'] == f'{website.url}/rows?raw=1'


def test_a_source_on_the_web_that_is_broken(run, tmp_path, website):
    """The line names the file that stays, since its address may send the right one tomorrow."""
    website.files['/rows.json'] = b'[{"instruction": "Say so.", "output"'
    flags = 'prepare.py', f'--source={website.url}/rows.json', '--dataset=web'
    process = run(*flags, code=2)
    file, = (tmp_path / 'data/web').glob('download-*')
    assert f'cannot read data/web/{file.name}: ' in process.stderr and process.stderr.endswith('; remove it to download it again\n')
    file.unlink()
    website.files['/rows.json'] = json.dumps(ROWS).encode()
    run(*flags, '--block_size=128')


def test_a_source_that_the_web_does_not_have(run, tmp_path, website):
    process = run('prepare.py', f'--source={website.url}/rows.json', '--dataset=web', code=2)
    assert f'cannot download download-{sha256_of(website.url + "/rows.json")[:8]}: {website.url}/rows.json: 404' in process.stderr
    assert not (tmp_path / 'data').exists()


def test_several_sources(run, tmp_path):
    (tmp_path / 'more').mkdir()
    write(tmp_path / 'a.json', PLAIN[:30])
    write(tmp_path / 'more/b.jsonl', PLAIN[20:50])  # 10 of them stand in a.json
    write(tmp_path / 'more/c.jsonl', PLAIN[50:])
    shown = run('prepare.py', '--source=a.json, more/*.jsonl', '--dataset=x').stdout
    assert 'left out: 10 rows: they equal others' in shown
    splits = splits_of(tmp_path, 'x')
    names = ['a.json', 'more/b.jsonl', 'more/c.jsonl']
    where = {row['instruction']: names[(i >= 30) + (i >= 50)] for i, row in enumerate(PLAIN)}
    for split in 'val', 'test':
        meta = splits[split][1]
        assert meta['sources'] == names
        assert [row['source_file'] for row in meta['rows']] == [where[row['instruction']] for row in meta['rows']]
        assert [names[number] for number in meta['source_of']] == [row['source_file'] for row in meta['rows']]
    counts = np.array([figures(shown, f'rows of {name}') for name in names])
    assert counts.sum(axis=1).tolist() == [30, 20, 10]
    assert counts.sum(axis=0).tolist() == figures(shown, 'rows') == [51, 3, 6]
    assert counts[:, 0].tolist() == [splits['train'][1]['source_of'].count(number) for number in range(3)]


# --- mistakes, and what a run leaves behind


@pytest.mark.parametrize('flags, said', [
    (['--source=absent.json'], 'absent.json'),
    (['--source=absent/*.json'], 'absent/*.json'),
    (['--source= ,'], 'source is empty'),
    (['--source=rows.json', '--fields=nonsense'], 'must be like'),
    (['--source=rows.json', '--fields=instruction:instruction,output:outptu'], 'outptu is missing'),
    (['--source=rows.json,faulty.json'], 'faulty.json: row 0: output is missing'),
    (['--source=one.json'], 'is left empty: there are 1 rows'),
    (['--source=rows.json', '--block_size=8'], 'train is left empty: the prompts of its 51 rows reach block_size=8'),
    (['--source=rows.json', '--train_share=0.95'], 'train_share=0.95 and test_share=0.1 are more than all rows'),
    (['--source=none.json', '--skip_faulty=True'], 'no row is left of none.json: output is missing'),
])
def test_a_mistake_leaves_nothing_behind(run, tmp_path, flags, said):
    write(tmp_path / 'rows.json', PLAIN)
    write(tmp_path / 'one.json', PLAIN[:1])
    write(tmp_path / 'none.json', [{'instruction': 'a'}] * 3)
    write(tmp_path / 'faulty.json', [{'instruction': 'a'}])
    assert said in run('prepare.py', *flags, code=2).stderr
    assert not (tmp_path / 'data').exists()


def test_a_name_that_the_user_gives_and_no_row_has_is_a_mistake(run, tmp_path):
    """Even where each row is read by another convention."""
    write(tmp_path / 'rows.json', PLAIN)
    said = run('prepare.py', '--source=rows.json', '--dataset=x', '--fields=instruction:q,output:a', code=2).stderr
    assert 'no row has ' in said and 'the rows have input, instruction, output' in said
    assert not (tmp_path / 'data').exists()


def test_the_data_of_another_source_are_replaced_when_told_so(run, tmp_path):
    write(tmp_path / 'a.json', PLAIN)
    write(tmp_path / 'b.json', PLAIN[::-1])
    run('prepare.py', '--source=a.json', '--dataset=x')
    a = splits_of(tmp_path, 'x')
    said = run('prepare.py', '--source=b.json', '--dataset=x', code=2).stderr
    assert 'data/x holds the rows of a.json: set --dataset to another folder, or replace them with --overwrite=True' in said
    assert splits_of(tmp_path, 'x') == a
    run('prepare.py', '--source=b.json', '--dataset=x', '--overwrite=True')
    assert splits_of(tmp_path, 'x')['train'][1]['source'] == 'b.json'


def test_rows_that_lie_in_the_folder_stay(run, tmp_path):
    (tmp_path / 'data/x/part').mkdir(parents=True)
    for name in 'train.jsonl', 'test.npy', 'part/rows.json':
        write(tmp_path / 'data/x' / name, PLAIN)
    before = {path: path.read_bytes() for path in (tmp_path / 'data/x').rglob('*.*')}
    assert len(before) == 3
    run('prepare.py', '--source=data/x/train.jsonl,data/x/part/*', '--dataset=x')
    assert {path: path.read_bytes() for path in before} == before


def test_rows_that_would_be_overwritten_stay(run, tmp_path):
    (tmp_path / 'data/x').mkdir(parents=True)
    write(tmp_path / 'data/x/train.json', PLAIN)
    assert 'data/x/train.json would be overwritten' in run('prepare.py', '--source=data/x/*.json', '--dataset=x', code=2).stderr
    assert json.loads((tmp_path / 'data/x/train.json').read_text()) == PLAIN


@pytest.mark.parametrize('name', ['train.json', 'val.json'])
def test_rows_that_are_no_data_set_stay(run, tmp_path, name):
    """Though the folder's other rows may be replaced."""
    (tmp_path / 'data/x').mkdir(parents=True)
    write(tmp_path / 'data/x' / name, PLAIN)
    write(tmp_path / 'rows.json', PLAIN)
    said = run('prepare.py', '--source=rows.json', '--dataset=x', '--overwrite=True', code=2).stderr
    assert f'data/x/{name} would be overwritten: set --dataset to another folder' in said
    assert json.loads((tmp_path / 'data/x' / name).read_text()) == PLAIN


@pytest.mark.skipif(os.name == 'nt', reason='Windows knows no such locks')
def test_two_runs_do_not_write_one_data_set(run, tmp_path):
    from config import lock_folder
    write(tmp_path / 'rows.json', PLAIN)
    lock_folder(tmp_path / 'data/x')
    assert 'another process writes to data/x' in run('prepare.py', '--source=rows.json', '--dataset=x', code=2).stderr


# kills the process when the file with this number is put in its place
KILL = """
import itertools, os
count = itertools.count()
replace = os.replace

def replace_or_die(source, target):
    if '.part' not in str(target) and next(count) == {moment}:
        os.kill(os.getpid(), 9)
    replace(source, target)

os.replace = replace_or_die
"""


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A folder with rows.json, and the data set x of it."""
    folder = tmp_path_factory.mktemp('plain')
    write(folder / 'rows.json', PLAIN)
    stage(folder, 'prepare.py', '--source=rows.json', '--dataset=x')
    return folder


@pytest.mark.parametrize('moment', range(7))
def test_a_kill_leaves_the_old_or_the_new_or_nothing(run, plain, tmp_path, monkeypatch, moment):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    # six files are put in their places
    run('prepare.py', '--source=rows.json', '--dataset=x', '--split_seed=7', first=KILL.format(moment=moment), code=-9 if moment < 6 else 0)
    monkeypatch.chdir(tmp_path)
    seeds = []
    for split in SPLITS:
        try:
            seeds.append(read_split('x', split).meta['split_seed'])
        except UserError:
            pass
    assert set(seeds) <= {7}
    assert (len(seeds) == 3) == (moment == 6)
    run('prepare.py', '--source=rows.json', '--dataset=x')  # which works, and removes what was left
    assert not (tmp_path / 'data/x/.part').exists()
    assert len(list((tmp_path / 'data/x').iterdir())) == 6


def test_a_long_run_shows_that_it_goes_on(tmp_path, monkeypatch, capsys):
    """In a log, where no bar moves: a line for every 200,000 rows."""
    rows = itertools.repeat({'instruction': 'a', 'output': 'b'}, 200_000)
    monkeypatch.setattr(prepare, 'read_rows', lambda *args: rows)
    monkeypatch.setattr(prepare, 'encode_row', lambda row, block_size: ([1, EOS], 0, 1))
    prepare.encode_sources({'a': 'a'}, tmp_path, Counter(), set())
    assert capsys.readouterr().out.splitlines() == ['200,000 rows read']


def test_a_template_may_begin_otherwise_where_a_row_has_an_input(monkeypatch):
    """As Stanford Alpaca's own does."""
    prompt = prepare.format_prompt
    monkeypatch.setattr(prepare, 'format_prompt', lambda row: f'With {row["input"]}: {prompt(row)}' if row['input'] else prompt(row))
    for row in {'instruction': 'Say it.', 'input': 'a word'}, {'instruction': 'Say it.', 'input': ''}:
        assert prepare.detokenize(prepare.encode_prompt(row)) == prepare.format_prompt(row)
