"""Rows to token files: template, offsets, splits, truncation, bad input."""
import gzip
import json
import os
import random
import re

import numpy as np
import pyarrow
import pytest
from conftest import ROOT, ROWS, stage
from pyarrow import parquet

from config import read_rows
from prepare import EOS, SPLITS, encode_prompt, encode_rows, format_prompt, get_tokenizer, read_split


def all_rows(data):
    """-> (ids, header, answer, split) of every row of data/tiny, offsets counted from the row's start."""
    for split in SPLITS:
        ids, meta = data(split)
        for start, header, answer, end in zip(meta['start'], meta['header'], meta['answer'], meta['end']):
            yield ids[start:end].tolist(), header - start, answer - start, split


def test_golden_prompt():
    row = {'instruction': 'Add.', 'input': '1 2', 'output': '3'}
    assert format_prompt(row) == (
        'Below is an instruction that describes a task. Write a response that appropriately completes the request.'
        '\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n')
    bare = format_prompt({'instruction': 'Add.'})
    assert bare == format_prompt({'instruction': 'Add.', 'input': ''}) == format_prompt({'instruction': 'Add.', 'input': None})
    assert '### Input' not in bare


def test_rows_are_prompt_answer_eos(data):
    tokenizer = get_tokenizer()
    by_prompt = {tuple(tokenizer.encode_ordinary(format_prompt(row))): row for row in ROWS}
    rows = list(all_rows(data))
    assert len(rows) == len(ROWS)
    for ids, header, answer, _ in rows:
        row = by_prompt[tuple(ids[:answer])]  # the prompt's ids are an exact prefix of the training ids
        assert ids[:answer] == encode_prompt(row)
        assert tokenizer.decode(ids[answer:]) == row['output'] + '<|endoftext|>'
        assert ids.index(EOS) == len(ids) - 1  # also where the text holds a literal <|endoftext|>
        assert ids[answer:-1] == tokenizer.encode_ordinary(row['output'])
        text = tokenizer.decode(ids[header:answer])
        assert text.endswith('\n\n### Response:\n') and not text[:-16].strip()  # white space before it may have merged
        if not row['instruction'][-1].isspace() or row.get('input'):
            assert text == '\n\n### Response:\n'


def test_files(prepared, data):
    for split in SPLITS:
        meta = json.loads((prepared / 'data/tiny' / f'{split}.json').read_text())
        size = (prepared / 'data/tiny' / f'{split}.bin').stat().st_size
        assert meta['format'] == 1 and meta['split'] == split and meta['eos'] == EOS and meta['tokenizer'] == 'gpt2'
        assert size == 2 * meta['tokens'] and meta['examples'] == len(meta['start']) == len(meta['answer'])
        assert ('rows' in meta) == (split != 'train')
        assert len(meta['sha256']) == 64 and meta['source'] == 'rows.json' and meta['split_seed'] == 123
    ids, _ = data('train')
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16
    rows = [ids[:answer] for ids, _, answer, _ in all_rows(data)]
    shared = os.path.commonprefix(rows)
    assert data('val')[1]['shared_prefix'] == len(shared) == min(len(shared), min(map(len, rows)) - 1)


def test_splits_keep_equal_prompts_together(run, tmp_path):
    rows = [{'instruction': f'Task {i % 70}', 'input': '', 'output': str(i)} for i in range(100)]
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    shown = run('prepare.py', '--source=rows.json', '--dataset=x').stdout
    meta = {split: json.loads((tmp_path / 'data/x' / f'{split}.json').read_text()) for split in SPLITS}
    assert [meta[split]['examples'] for split in SPLITS] == [85, 5, 10]
    held = {row['instruction'] for split in ('val', 'test') for row in meta[split]['rows']}
    ids = np.fromfile(tmp_path / 'data/x/train.bin', dtype='<u2')
    train = get_tokenizer().decode(ids.tolist())
    assert not [text for text in held if f'{text}\n' in train]
    assert shown.split('prompts also in train')[1].split('\n')[0].split() == ['0', '0', '0']
    # another seed, another split; the same seed, the same bytes
    first = (tmp_path / 'data/x/train.bin').read_bytes()
    run('prepare.py', '--source=rows.json', '--dataset=x', '--split_seed=7')
    assert (tmp_path / 'data/x/train.bin').read_bytes() != first
    run('prepare.py', '--source=rows.json', '--dataset=x')
    assert (tmp_path / 'data/x/train.bin').read_bytes() == first
    # the file's own order, and what straddles it
    shown = run('prepare.py', '--source=rows.json', '--dataset=x', '--split_seed=-1').stdout
    test = json.loads((tmp_path / 'data/x/test.json').read_text())
    assert test['rows'] == rows[85:95]
    assert shown.split('prompts also in train')[1].split('\n')[0].split() == ['0', '5', '10']


def test_truncated_and_dropped(run, tmp_path):
    long = ' and so on' * 40
    rows = [{'instruction': f'Task {i}', 'input': '', 'output': 'x'} for i in range(60)]
    rows[3]['output'] += long  # truncated
    rows[5]['instruction'] += long  # dropped
    rows[7]['output'] = ''  # learns to end at once
    prompt = {'instruction': 'Say' + ' on' * (63 - len(encode_prompt({'instruction': 'Say'}))), 'input': ''}
    rows[9] = prompt | {'output': 'two tokens'}  # cut behind the first
    rows[5]['output'] = rows[52]['output'] = 'only here'  # of which train has none
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    shown = run('prepare.py', '--source=rows.json', '--dataset=x', '--block_size=64', '--split_seed=-1').stdout
    assert [figures(shown, name) for name in ('truncated', 'dropped', 'empty answers')] == [[2, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert figures(shown, 'answers also in train') == [0, 3, 5]
    assert '[[' in shown and ']]' in shown  # plain marks, as this is no terminal
    ids = np.fromfile(tmp_path / 'data/x/train.bin', dtype='<u2')
    meta = json.loads((tmp_path / 'data/x/train.json').read_text())
    assert meta['examples'] == 50
    ends = meta['start'][1:] + [len(ids)]
    lengths = np.diff(meta['start'] + [len(ids)])
    assert lengths.max() == 64 and ids[ends[3] - 1] != EOS  # a cut answer did not end there
    assert [i for i, end in enumerate(ends) if ids[end - 1] != EOS] == [3, 8]
    run('prepare.py', '--source=rows.json', '--dataset=y', '--block_size=8', code=2)
    assert not (tmp_path / 'data/y').exists()


@pytest.mark.parametrize('text, said', [
    ('[{"instruction": "a", "output": "b"', 'not JSON'),
    ('{"data": []}', 'row 0: instruction is missing; say which of data it is: --fields='),
    ('[]', 'has no rows'),
    ('', 'not JSON'),
    ('[1]', 'row 0: it is int'),
    ('[{"instruction": "a"}]', 'row 0: output is missing'),
    ('[{"instruction": "a", "output": 3}]', 'row 0: output is 3'),
    ('[{"instruction": "a", "output": null}]', 'row 0: output is None'),
    ('[{"instruction": "a", "output": "b", "input": 0}]', 'row 0: input is 0'),
    ('[{"instruction": " ", "output": "b"}]', 'row 0: instruction is empty'),
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "outpt": "b"}\n{"a\n', 'line 3 is not JSON'),
    ('[{"instruction": "a", "output": "b"}]', 'a split is left empty'),
    (json.dumps([{'output': 'x'}] * 50), 'and 30 more'),
])
def test_bad_input(run, tmp_path, text, said):
    (tmp_path / 'rows.json').write_text(text)
    assert said in run('prepare.py', '--source=rows.json', '--dataset=x', code=2).stderr
    assert not (tmp_path / 'data').exists()


def test_missing_file_and_address(run):
    assert 'absent.json' in run('prepare.py', '--source=absent.json', code=2).stderr


def test_jsonl_is_the_same_as_json(tmp_path):
    random.seed(0)
    (tmp_path / 'a.json').write_text('\ufeff' + json.dumps(ROWS), encoding='utf-8')
    # characters at which Python, but not JSONL, ends a line
    rows = [dict(row, output=row['output'] + '\u2028\x85') for row in ROWS]
    (tmp_path / 'b.json').write_text(json.dumps(rows, ensure_ascii=False), encoding='utf-8')
    (tmp_path / 'b.jsonl').write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8')
    for source in ('a.json', 'b.json', 'b.jsonl'):
        stage(tmp_path, 'prepare.py', f'--source={source}', f'--dataset={source}')
    bins = {source: (tmp_path / 'data' / source / 'train.bin').read_bytes() for source in ('a.json', 'b.json', 'b.jsonl')}
    assert bins['b.json'] == bins['b.jsonl'] != bins['a.json']


def test_lone_surrogates_are_safe(run, tmp_path):
    rows = [{'instruction': f'Task {i}', 'output': '\ud83d'} for i in range(40)]
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    run('prepare.py', '--source=rows.json', '--dataset=x')


def test_other_versions_are_refused(prepared, tmp_path, monkeypatch, data):
    from config import UserError
    for change in ({'format': 2}, {'format': 3}, {'template': 'other'}, {'tokens': 1}):
        folder = tmp_path / 'data' / 'tiny'
        folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            for ending in ('bin', 'json'):
                (folder / f'{split}.{ending}').write_bytes((prepared / 'data/tiny' / f'{split}.{ending}').read_bytes())
        meta = json.loads((folder / 'val.json').read_text())
        (folder / 'val.json').write_text(json.dumps(meta | change))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match='prepare.py'):
            read_split('tiny', 'val')


def test_tokenizer_needs_no_network(tmp_path):
    """Every connection refused, and no cache of tiktoken's: the ids are GPT-2's."""
    code = ('import socket, sys; sys.path.insert(0, sys.argv[1])\n'
            'def refuse(*args, **kwargs): raise OSError("no network")\n'
            'socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n'
            'from prepare import get_tokenizer\n'
            'print(get_tokenizer().encode_ordinary("Hello, world! <|endoftext|>"))')
    shown = stage(tmp_path, '-c', code, str(ROOT), env={'TIKTOKEN_CACHE_DIR': str(tmp_path)}).stdout
    assert json.loads(shown) == [15496, 11, 995, 0, 1279, 91, 437, 1659, 5239, 91, 29]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    from config import UserError, atomic_write, write_json
    write_json(tmp_path / 'x.json', 1)

    def fail(file):
        file.write('half')
        raise OSError(28, 'No space left on device')
    with pytest.raises(UserError, match='No space left on device'):
        atomic_write(tmp_path / 'x.json', fail)
    assert json.loads((tmp_path / 'x.json').read_text()) == 1 and len(list(tmp_path.iterdir())) == 1


# --- sources

def edited(folder, **changes):
    """A copy of prepare.py in which constants have other values -> (its path, the environment to run it in)."""
    text = (ROOT / 'prepare.py').read_text()
    for old, new in changes.items():
        line = next(line for line in text.splitlines() if line.startswith(f'{old} = ') or line.strip() == old)
        text = text.replace(line, new if line.strip() == old else f'{old} = {new}')
    (folder / 'edited').mkdir(exist_ok=True)
    (folder / 'edited' / 'prepare.py').write_text(text)
    return folder / 'edited' / 'prepare.py', {'PYTHONPATH': str(ROOT)}


def splits_of(folder, dataset):
    """-> {split: (bytes of the .bin, the .json)}."""
    folder = folder / 'data' / dataset
    return {split: ((folder / f'{split}.bin').read_bytes(), json.loads((folder / f'{split}.json').read_text())) for split in SPLITS}


def figures(shown, name):
    """The figures of a line of the table, train, val, test."""
    return [int(figure.replace(',', '')) for figure in shown.split(f'\n{name} ')[1].split('\n')[0].split()]


def write_rows(path, rows):
    """In the form that the ending names."""
    text = '\n'.join(map(json.dumps, rows)) if 'jsonl' in path.name else json.dumps(rows, indent=2)
    if path.suffix == '.parquet':
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == '.gz':
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


PLAIN = [{'instruction': f'Task {i}', 'input': 'x' * (i % 3), 'output': f'Answer {i}'} for i in range(60)]
CONVENTIONS = {
    'alpaca': lambda row: row,
    'dolly': lambda row: {'instruction': row['instruction'], 'context': row['input'], 'response': row['output'], 'category': 'qa'},
    'context': lambda row: {'instruction': row['instruction'], 'context': row['input'], 'output': row['output']},
    'completion': lambda row: {'prompt': row['instruction'], 'input': row['input'], 'completion': row['output']},
    'answer': lambda row: {'answer': row['output'], 'question': row['instruction'], 'context': row['input'], 'id': 7},
    'openai': lambda row: {'messages': [
        {'role': 'system', 'content': row['input']}, {'role': 'user', 'content': row['instruction']},
        {'role': 'assistant', 'content': row['output']}, {'role': 'user', 'content': 'And?'}, {'role': 'assistant', 'content': 'No.'}]},
    'sharegpt': lambda row: {'id': 'a', 'conversations': [
        {'from': 'system', 'value': row['input']}, {'from': 'gpt', 'value': 'Hello.'},
        {'from': 'human', 'value': row['instruction']}, {'from': 'gpt', 'value': row['output']}]},
    'q,a': lambda row: {'q': row['instruction'], 'c': row['input'], 'a': row['output'], 'output': 'no', 'prompt': 'no'},
}


@pytest.mark.parametrize('name', CONVENTIONS)
def test_conventions_give_the_same_ids(run, tmp_path, name):
    write_rows(tmp_path / 'plain.json', PLAIN)
    run('prepare.py', '--source=plain.json', '--dataset=plain')
    flags = ['--fields=instruction:q, input:c,output:a'] if name == 'q,a' else []
    for ending in 'json', 'jsonl', 'json.gz', 'jsonl.gz', 'parquet':
        write_rows(tmp_path / f'other.{ending}', list(map(CONVENTIONS[name], PLAIN)))
        shown = run('prepare.py', f'--source=other.{ending}', f'--dataset={ending}', *flags).stdout
        plain, other = splits_of(tmp_path, 'plain'), splits_of(tmp_path, ending)
        for split in SPLITS:
            assert plain[split][0] == other[split][0] and plain[split][1]['answer'] == other[split][1]['answer']
        rows = other['test'][1]['rows']
        assert [[row[key] for key in ('instruction', 'input', 'output')] for row in rows] == [list(row.values()) for row in plain['test'][1]['rows']]
        assert set(rows[0]) - {'instruction', 'input', 'output'} == {
            'dolly': {'category'}, 'answer': {'id'}, 'openai': {'messages_left_out'}, 'sharegpt': {'id', 'messages_left_out'},
            'q,a': {'prompt'}}.get(name, set())
        left_out = {'openai': 120, 'sharegpt': 60}.get(name)
        assert (f'{left_out} messages were left out' in shown) if left_out else 'messages were left out' not in shown


def test_each_row_has_a_convention_of_its_own(run, tmp_path):
    write_rows(tmp_path / 'plain.json', PLAIN)
    forms = list(CONVENTIONS.values())
    write_rows(tmp_path / 'mixed.jsonl', [forms[i % len(forms)](row) for i, row in enumerate(PLAIN)])
    run('prepare.py', '--source=plain.json', '--dataset=plain')
    run('prepare.py', '--source=mixed.jsonl', '--dataset=mixed', '--fields=instruction:q,input:c,output:a')
    plain, mixed = splits_of(tmp_path, 'plain'), splits_of(tmp_path, 'mixed')
    assert all(plain[split][0] == mixed[split][0] for split in SPLITS)


def test_rows_without_an_output(tmp_path):
    """As sample.py takes them for labelling: what a row is asked does not depend on its output being there."""
    talk = [{'role': 'system', 'content': 'c'}, {'role': 'user', 'content': 'i'}]
    write_rows(tmp_path / 'ask.jsonl', [
        {'instruction': 'i', 'input': 'c'}, {'instruction': 'i', 'context': 'c'}, {'question': 'i', 'context': 'c'}, {'messages': talk},
        {'messages': [*talk, {'role': 'assistant', 'content': 'o'}]}])
    rows = list(read_rows(tmp_path / 'ask.jsonl', is_answered=False))
    assert [(row['instruction'], row['input'], row.get('output') or '') for row in rows] == [('i', 'c', '')] * 4 + [('i', 'c', 'o')]


@pytest.mark.parametrize('text, said', [
    ('[{"q": "a", "a": "b"}]', 'row 0: instruction is missing; say which of q, a it is: --fields='),
    ('[{"question": "a", "reply": "b"}]', 'row 0: output is missing; say which of question, reply it is: --fields='),
    ('[{"messages": [{"role": "user", "content": "x"}]}]', 'row 0: its messages are wrong'),
    ('[{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]}]', 'row 0: output is None'),
    ('[{"conversations": [{"from": "human"}, 7]}]', 'row 0: its conversations are wrong'),
    ('[{"instruction": "a", "output": "b"}] [', 'there is text after the end'),
    ('[{"instruction": "a", "output": "b"}, {"instruction": "a", "outp', 'after 1 rows'),
    ('[{"instruction": "a", "output": "b"} oops', 'after 1 rows'),
])
def test_what_does_not_fit_is_told(run, tmp_path, text, said):
    (tmp_path / 'rows.json').write_text(text)
    assert said in run('prepare.py', '--source=rows.json', '--dataset=x', code=2).stderr
    assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize('flags, said', [
    (['--source=absent/*.json'], 'absent/*.json'), (['--source= ,'], 'source is empty'),
    (['--source=rows.json', '--fields=instruction:q'], 'must be like'), (['--source=rows.json', '--fields=nonsense'], 'must be like'),
    (['--source=rows.json,cut.json.gz'], 'cannot read cut.json.gz'), (['--source=rows.json,bad.parquet'], 'bad.parquet'),
])
def test_sources_that_cannot_be_read(run, tmp_path, flags, said):
    write_rows(tmp_path / 'rows.json', PLAIN)
    write_rows(tmp_path / 'whole.json.gz', PLAIN)
    (tmp_path / 'cut.json.gz').write_bytes((tmp_path / 'whole.json.gz').read_bytes()[:-20])
    (tmp_path / 'bad.parquet').write_bytes(b'PAR1' * 9)
    assert said in run('prepare.py', *flags, code=2).stderr
    assert not (tmp_path / 'data').exists()


def test_several_sources(run, tmp_path):
    (tmp_path / 'more').mkdir()
    write_rows(tmp_path / 'a.json', PLAIN[:30])
    write_rows(tmp_path / 'more/b.jsonl', [CONVENTIONS['dolly'](row) for row in PLAIN[20:50]])  # 10 of them stand in a.json
    write_rows(tmp_path / 'more/c.jsonl', [CONVENTIONS['openai'](row) for row in PLAIN[50:]])
    shown = run('prepare.py', '--source=a.json, more/*.jsonl', '--dataset=x').stdout
    assert '10 rows were left out, since they equal others' in shown
    splits, where = splits_of(tmp_path, 'x'), {}
    names = ['a.json', 'more/b.jsonl', 'more/c.jsonl']
    for number, row in enumerate(PLAIN):
        where[row['instruction']] = names[(number >= 30) + (number >= 50)]
    for split in 'val', 'test':
        meta = splits[split][1]
        assert meta['sources'] == names
        assert [row['source'] for row in meta['rows']] == [where[row['instruction']] for row in meta['rows']]
        assert [names[number] for number in meta['source_of']] == [row['source'] for row in meta['rows']]
    counts = np.array([figures(shown, f'rows of {name}') for name in names])
    assert counts.sum(axis=1).tolist() == [30, 20, 10] and counts.sum(axis=0).tolist() == figures(shown, 'rows') == [51, 3, 6]
    assert counts[:, 0].tolist() == [splits['train'][1]['source_of'].count(number) for number in range(3)]


def test_prompts_that_differ_in_form_alone_stay_together(run, tmp_path):
    rows = []
    for i in range(80):
        forms = f'Write the number {i}.', f'write  the number {i}', f'Write, the NUMBER {i}!\n'
        rows += [{'instruction': form, 'input': '', 'output': f'{i} {n if i % 2 else ""}'} for n, form in enumerate(forms)]
    random.Random(1).shuffle(rows)
    write_rows(tmp_path / 'rows.json', rows + rows[:5])
    shown = run('prepare.py', '--source=rows.json', '--dataset=x').stdout
    assert '5 rows were left out' in shown
    held = {split: {re.search(r'\d+', row['instruction'])[0] for row in splits_of(tmp_path, 'x')[split][1]['rows']} for split in ('val', 'test')}
    assert not held['val'] & held['test'] and figures(shown, 'rows') == [204, 12, 24]
    train = get_tokenizer().decode(np.fromfile(tmp_path / 'data/x/train.bin', '<u2').tolist())
    for number in held['val'] | held['test']:
        assert not re.search(f'number {number}[.!\n]', train, re.IGNORECASE)
    # answers of test that stand in train, counted anew
    write_rows(tmp_path / 'rows.json', [{'instruction': f'Task {i}', 'output': f' {i % 30} '} for i in range(100)])
    shown = run('prepare.py', '--source=rows.json', '--dataset=x', '--split_seed=-1').stdout
    assert figures(shown, 'answers also in train') == [0, 5, 10]
    write_rows(tmp_path / 'rows.json', [{'instruction': f'Task {i}', 'output': str(min(i, 90))} for i in range(100)])
    assert figures(run('prepare.py', '--source=rows.json', '--dataset=x', '--split_seed=-1').stdout, 'answers also in train') == [0, 0, 0]


def test_chunks_change_nothing_and_large_splits_read_alike(run, tmp_path, monkeypatch):
    write_rows(tmp_path / 'a.json', ROWS + PLAIN)
    write_rows(tmp_path / 'b.jsonl', [{'q': f'Q {i}', 'a': 'A'} for i in range(40)])
    flags = '--source=a.json,b.jsonl', '--fields=instruction:q,output:a', '--block_size=80'
    run('prepare.py', *flags, '--dataset=whole')
    path, env = edited(tmp_path, CHUNK='7')
    run(path, *flags, '--dataset=chunks', env=env)
    whole, chunks = splits_of(tmp_path, 'whole'), splits_of(tmp_path, 'chunks')
    for split in SPLITS:
        assert whole[split][0] == chunks[split][0]
        whole[split][1].pop('config'), chunks[split][1].pop('config')
        assert whole[split][1] == chunks[split][1]
    # offsets and rows in files of their own
    path, env = edited(tmp_path, MANY='5')
    run(path, *flags, '--dataset=large', env=env)
    monkeypatch.chdir(tmp_path)
    for split in SPLITS:
        (ids, meta), (large_ids, large) = read_split('whole', split), read_split('large', split)
        text = (tmp_path / f'data/large/{split}.json').read_text()
        assert '"start"' not in text and '"rows"' not in text and json.loads(text)['format'] == 2
        assert ids.tobytes() == large_ids.tobytes() and meta.get('rows') == large.get('rows')
        for name in 'start', 'header', 'answer', 'source_of', 'end':
            assert np.array_equal(meta[name], large[name])
    assert read_split('large', 'test', n_rows=2)[1]['rows'] == meta['rows'][:2]
    # a small split that replaces a large one leaves no file of it
    run('prepare.py', *flags, '--dataset=large')
    assert sorted(file.name for file in (tmp_path / 'data/large').iterdir()) == sorted(f'{s}.{e}' for s in SPLITS for e in ('bin', 'json'))


def test_rows_that_lie_in_the_folder_stay(run, tmp_path):
    (tmp_path / 'data/x/part').mkdir(parents=True)
    for name in 'train.jsonl', 'test.npy', 'part/rows.json', 'train.json':
        write_rows(tmp_path / 'data/x' / name, PLAIN)
    before = {path: path.read_bytes() for path in (tmp_path / 'data/x').rglob('*.*')}
    assert 'would be overwritten' in run('prepare.py', '--source=data/x/*.json', '--dataset=x', code=2).stderr
    run('prepare.py', '--source=data/x/train.jsonl,data/x/part/*', '--dataset=x')
    after = {path: path.read_bytes() for path in (tmp_path / 'data/x').rglob('*.*')}
    assert len(before) == 4 and {path: after[path] for path in before if path.name != 'train.json'}.items() <= before.items()


@pytest.mark.parametrize('moment', range(7))
def test_a_kill_leaves_the_old_or_the_new_or_nothing(run, tmp_path, monkeypatch, moment):
    from config import UserError
    write_rows(tmp_path / 'rows.json', PLAIN)
    run('prepare.py', '--source=rows.json', '--dataset=x')
    path, env = edited(tmp_path, **{'os.replace(file, folder / file.name)': (
        '            killed = globals().get("killed", -1) + 1\n'
        f'            os.kill(os.getpid(), 9) if killed == {moment} else os.replace(file, folder / file.name)')})
    run(path, '--source=rows.json', '--dataset=x', '--split_seed=7', env=env, code=-9 if moment < 6 else 0)
    monkeypatch.chdir(tmp_path)
    seeds = []
    for split in SPLITS:
        try:
            seeds.append(read_split('x', split)[1]['split_seed'])
        except UserError:
            pass
    assert set(seeds) <= {7} and (len(seeds) == 3) == (moment == 6)
    run('prepare.py', '--source=rows.json', '--dataset=x')  # which works, and removes what was left
    assert not (tmp_path / 'data/x/.part').exists() and len(list((tmp_path / 'data/x').iterdir())) == 6


def test_prompts_encoded_in_one_text_have_the_ids_of_each(monkeypatch):
    words = ['a', 'b c', ' ', '\n', '\n\n', '\t', ':', "'s", '12', '###', 'é', '日本', '🎉', '<|endoftext|>', '\u2028', '.', 'I', '\ud83d', '\x00']
    draw, tokenizer = random.Random(0), get_tokenizer()
    for n_rows in (1, 3, 400):
        rows = [{'instruction': ''.join(draw.choices(words, k=draw.randint(1, 6))), 'input': ''.join(draw.choices(words, k=draw.randint(0, 3))),
                 'output': ''.join(draw.choices(words, k=draw.randint(0, 6)))} for _ in range(n_rows)]
        if n_rows == 3:  # without those for which each text is encoded apart
            rows = [{key: re.sub('<.endoftext.>|\ud83d', '', text) for key, text in row.items()} for row in rows]
        for row, (ids, header, answer) in zip(rows, encode_rows(rows, 1024)):
            prompt = tokenizer.encode_ordinary(format_prompt(row))
            assert ids == [*prompt, *tokenizer.encode_ordinary(row['output']), EOS] and answer == len(prompt)
            assert tokenizer.decode(ids[header:answer]).endswith('\n\n### Response:\n')


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='only Linux tells the peak of a process')
def test_memory_is_bounded(tmp_path):
    """86 MB of rows take 15 MB more than 17 MB of them do, though most of each row is a field of the user's."""
    code = ('import re, runpy, sys\n'
            'sys.path.insert(0, sys.argv[1].rpartition("/")[0])\n'
            'del sys.argv[0]\n'
            'runpy.run_path(sys.argv[0], run_name="__main__")\n'
            'print("peak", re.search("VmHWM: *\t *([0-9]+)", open("/proc/self/status").read())[1])')
    peaks = []
    for n_rows in 8_000, 40_000:
        with open(tmp_path / 'rows.json', 'w') as file:
            rows = (json.dumps({'instruction': f'Task {i}', 'output': 'word ' * 20, 'more': 'x' * 2000}) for i in range(n_rows))
            file.write('[' + ',\n'.join(rows) + ']')
        shown = stage(tmp_path, '-c', code, str(ROOT / 'prepare.py'), '--source=rows.json', f'--dataset=x{n_rows}', '--train_share=0.99',
                      '--test_share=0.005').stdout
        peaks.append(int(shown.rpartition('peak ')[2]) * 1024)
    assert peaks[1] - peaks[0] < 15e6 < (tmp_path / 'rows.json').stat().st_size / 2, peaks


def test_rows_that_a_script_writes(run, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/make_demo.py').write_text("NAME = 'demo.json'")
    assert 'run: python data/make_demo.py' in run('prepare.py', ROOT / 'config/demo.py', code=2).stderr
    assert 'make_demo' not in run('prepare.py', '--source=data/others.json', code=2).stderr
