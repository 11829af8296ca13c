"""The demo's rows: what the script writes, and what the demo promises of them."""
import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from prepare import encode_rows, format_prompt, read_rows, split_rows

DATA = Path(__file__).parent.parent / 'data'
FILES = 'demo.json', 'demo_heldback.json'


@pytest.fixture(scope='module')
def rows():
    return {name: list(read_rows(DATA / name)) for name in FILES}


def test_files_are_what_the_script_writes(tmp_path):
    script = runpy.run_path(str(DATA / 'make_demo.py'))
    for name, tasks in zip(FILES, (script['TASKS'], script['HELD_BACK'])):
        script['write_rows'](tmp_path / name, script['make_rows'](tasks, script['SEED']))
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_enough_rows_and_families(rows):
    families = Counter(row['family'] for row in rows['demo.json'])
    assert families.total() >= 1000 and len(families) >= 10 and min(families.values()) >= 100, families
    assert len(rows['demo_heldback.json']) >= 250
    assert any(row['input'] for row in rows['demo.json']) and not all(row['input'] for row in rows['demo.json'])


@pytest.mark.parametrize('name', FILES)
def test_every_row_is_valid(rows, name):
    prompts = Counter(map(format_prompt, rows[name]))
    assert prompts.most_common(1)[0][1] == 1, prompts.most_common(1)
    for row in rows[name]:
        assert list(row) == ['instruction', 'input', 'output', 'family']
        assert all(isinstance(text, str) and text == text.strip() for text in row.values()), row
        assert row['instruction'] and row['output'] and '{' not in json.dumps(row)[1:], row
        assert not re.search('  |\n', row['instruction'] + row['input'] + row['output']), row
    assert all(ids[-1] == 50256 for ids, _, _ in encode_rows(rows[name], block_size=128)), 'a row is cut'


def test_the_held_back_family_is_new(rows):
    held_back = {row['family'] for row in rows['demo_heldback.json']}
    assert len(held_back) == 1 and not held_back & {row['family'] for row in rows['demo.json']}
    assert not {row['instruction'] for row in rows['demo_heldback.json']} & {row['instruction'] for row in rows['demo.json']}
    assert not [row for row in rows['demo.json'] if 'active voice' in row['instruction']]


def test_every_family_is_tested_and_no_test_prompt_is_trained_on(rows):
    rows = rows['demo.json']
    splits = split_rows([hash(format_prompt(row)) for row in rows], 123, 0.85, 0.10)
    prompts = {split: {format_prompt(rows[n]) for n in numbers} for split, numbers in splits.items()}
    assert not prompts['train'] & prompts['test'] and not prompts['train'] & prompts['val']
    assert {rows[n]['family'] for n in splits['test']} == {row['family'] for row in rows}


def test_numbers_are_right(rows):
    """The answers that a reader cannot check at a glance, worked out anew from the prompt's own text."""
    for row in rows['demo.json']:
        text, answer = row['instruction'] + ' ' + row['input'], row['output']
        asked, told = ([int(n) for n in re.findall(r'\d+', part)] for part in (text, answer))
        if row['family'] == 'arithmetic':
            assert told == [asked[0] + asked[1] if '+' in text else asked[0] - asked[1]], row
        elif row['family'] == 'sorting':
            assert told == sorted(asked, reverse='descending' in text or 'largest to smallest' in text), row
        elif row['family'] == 'comparison':
            assert told == [max(asked) if 'larger' in text else min(asked)] and len(set(asked)) == 2, row
        elif row['family'] == 'counting':
            words = (row['input'] or row['instruction'].split(': ')[1]).split(', ')
            assert answer.split()[2] == 'zero one two three four five six'.split()[len(words)], row
        elif row['family'] == 'alphabetical order':
            words = answer.removeprefix('Sorted: ').split(', ')
            assert words == sorted(words) and set(words) <= set(re.findall(r'\w+', text)), row
