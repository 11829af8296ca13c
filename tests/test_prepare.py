"""Rows to token files: template, offsets, splits, truncation, bad input."""
import json
import os
import random

import numpy as np
import pytest
from conftest import ROWS, stage

from prepare import EOS, SPLITS, encode_prompt, format_prompt, get_tokenizer, read_split


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
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    shown = run('prepare.py', '--source=rows.json', '--dataset=x', '--block_size=64', '--split_seed=-1').stdout
    assert shown.split('truncated')[1].split()[:3] == ['1', '0', '0'] and shown.split('dropped')[1].split()[:3] == ['1', '0', '0']
    assert '[[' in shown and ']]' in shown  # plain marks, as this is no terminal
    ids = np.fromfile(tmp_path / 'data/x/train.bin', dtype='<u2')
    meta = json.loads((tmp_path / 'data/x/train.json').read_text())
    assert meta['examples'] == 50
    ends = meta['start'][1:] + [len(ids)]
    lengths = np.diff(meta['start'] + [len(ids)])
    assert lengths.max() == 64 and ids[ends[3] - 1] != EOS  # a cut answer did not end there
    assert [i for i, end in enumerate(ends) if ids[end - 1] != EOS] == [3]
    run('prepare.py', '--source=rows.json', '--dataset=y', '--block_size=8', code=2)
    assert not (tmp_path / 'data/y').exists()


@pytest.mark.parametrize('text, said', [
    ('[{"instruction": "a", "output": "b"', 'not JSON'),
    ('{"data": []}', 'no list of rows'),
    ('[]', 'no list of rows'),
    ('', 'not JSON'),
    ('[1]', 'row 0 is int'),
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
    for change in ({'format': 2}, {'template': 'other'}, {'tokens': 1}):
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
    from conftest import ROOT
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
