"""The demo's rows: what the script writes, and what the demo promises of them."""
import hashlib
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

from prepare import encode_row, get_tokenizer

import pytest

DATA = Path(__file__).parent.parent / 'data'
FILES = 'demo.json', 'demo_heldback.json'
SHA256 = '7f856d4314e275cf', '0d97d540e3e3289a'  # their first 16 digits


@pytest.fixture(scope='module')
def script():
    sys.path.insert(0, str(DATA))
    return runpy.run_path(str(DATA / 'make_demo.py'))


@pytest.fixture(scope='module')
def rows():
    return {name: json.loads((DATA / name).read_text()) for name in FILES}


@pytest.fixture(scope='module')
def splits(rows):
    """As config/demo.py cuts the file."""
    config = runpy.run_path(str(DATA.parent / 'config/demo.py'))
    n = len(rows['demo.json'])
    assert config['split_seed'] == -1
    n_train = int(n * config['train_share'])
    n_test = int(n * config['test_share'])
    return {'train': rows['demo.json'][:n_train], 'test': rows['demo.json'][n_train:n_train + n_test],
            'val': rows['demo.json'][n_train + n_test:]}


def words(row, fields=('instruction', 'input')):
    return re.findall(r'\w+', ' '.join(row[field] for field in fields).lower())


def test_files_are_what_the_script_writes(script, rows, tmp_path):
    made = script['make_all']()
    assert made == rows, 'run: python data/make_demo.py'
    for name, sha256 in zip(FILES, SHA256):  # the same bytes everywhere: to these belong the figures in docs/demo.md
        script['write_rows'](tmp_path / name, made[name])
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest().startswith(sha256), name


def test_enough_words_rows_and_families(script, rows, splits):
    listed = {word for entries in script['WORDS'].values() for entry in entries for word in entry}
    assert len(listed) > 4000
    one_token = [word for word in listed if len(get_tokenizer().encode_ordinary(' ' + word)) == 1]
    assert len(one_token) > 0.85 * len(listed)
    families = Counter(row.get('family') for row in splits['train'])  # of None those that ask for none of its tasks
    assert len(families) == 17 and min(families.values()) >= 400 and len(splits['train']) == 80_000, families
    assert len(rows['demo_heldback.json']) == 300 and len(splits['val']) == 300
    assert Counter(row.get('source') for row in splits['test']) == {'listed words': 600, 'unseen words': 300}
    assert not any('source' in row for row in splits['train'] + splits['val'])


def test_visitors_habits_are_among_the_rows(splits):
    """Ten wordings a family or more, all in one line, odd case, questions, long sentences, names of several tokens."""
    wordings = {}
    for row in splits['train']:
        if row['input']:
            wordings.setdefault(row.get('family'), set()).add(row['instruction'].lower())
    assert min(len(found) for found in wordings.values()) >= 10, {family: len(found) for family, found in wordings.items()}
    shares = {
        'one line': lambda row: not row['input'],
        'lower case': lambda row: row['instruction'].islower(),
        'question': lambda row: row['input'].endswith('?'),
        'long': lambda row: len(words(row, ['input'])) >= 12,
    }
    for name, is_one in shares.items():
        assert sum(map(is_one, splits['train'])) > 100, name


@pytest.mark.parametrize('name', FILES)
def test_every_row_is_valid(rows, name):
    prompts = Counter(tuple(words(row)) for row in rows[name])
    assert prompts.most_common(1)[0][1] == 1, prompts.most_common(1)  # so that no test prompt is trained on
    for row in rows[name]:
        assert list(row)[:3] == ['instruction', 'input', 'output'] and set(row) <= {'instruction', 'input', 'output', 'family', 'source'}
        assert all(isinstance(text, str) and text == text.strip() for text in row.values()), row
        assert row['instruction'] and row['output'] and '{' not in json.dumps(row)[1:], row
        assert not re.search('  |\n', row['instruction'] + row['input'] + row['output']), row
        ids, _, _ = encode_row(row, block_size=128)
        assert ids[-1] == 50256, 'the row is cut'


def test_unseen_words_stand_in_no_training_row(splits):
    """In any form, in prompts and in answers; and the answers to them need no word that is not in the prompt or in train."""
    fields = 'instruction', 'input', 'output'
    met = {word for split in ('train', 'val') for row in splits[split] for word in words(row, fields)}
    unseen = [row for row in splits['test'] if row.get('source') == 'unseen words']
    for row in unseen:
        new = set(words(row)) - met
        assert new, row
        assert set(words(row, ['output'])) - set(words(row)) <= met, row
    # and they are many
    assert len({word for row in unseen for word in set(words(row)) - met}) > 100


def test_more_words_stand_in_training_rows_alone(script, splits):
    more = {entry[0] for name, entries in script['WORDS'].items() if name.startswith('more') for entry in entries}
    listed = {word for entries in script['LISTED'].values() for entry in entries for word in entry}
    assert len(more) > 1800 and not more & listed
    found = {split: set().union(*(words(row, ['input']) for row in rows)) & more for split, rows in splits.items()}
    assert len(found['train']) > 0.95 * len(more)
    assert not found['test'] and not found['val'], found


def test_the_held_back_family_is_new(rows):
    held_back = {row['family'] for row in rows['demo_heldback.json']}
    assert len(held_back) == 1 and not held_back & {row.get('family') for row in rows['demo.json']}
    assert not [row for row in rows['demo.json'] if 'active voice' in row['instruction']]


def test_forms_of_verbs(script):
    """Of irregular verbs, from a list of another hand; and of regular ones by their spelling."""
    known = ('write writes wrote written;break breaks broke broken;buy buys bought bought;eat eats ate eaten;take takes took taken;'
             'see sees saw seen;build builds built built;give gives gave given;bite bites bit bitten;steal steals stole stolen;'
             'teach teaches taught taught;cut cuts cut cut;drive drives drove driven;catch catches caught caught;hide hides hid hidden')
    verbs = {entry[0]: entry for entry in script['WORDS']['transitive']}
    found = [verbs[forms.split()[0]][:4] == forms.split() for forms in known.split(';') if forms.split()[0] in verbs]
    assert all(found) and len(found) >= 12
    regular = [entry for entry in verbs.values() if entry[2] == entry[3] and entry[2].endswith('ed') and len(entry[2]) > len(entry[0])]
    for base, third, past, participle, ing in regular:
        assert past == participle and past in (base + 'ed', base + 'd', base + base[-1] + 'ed', base[:-1] + 'ied'), base
        assert third in (base + 's', base + 'es', base[:-1] + 'ies') and ing.endswith('ing'), base
    assert len(regular) > 200


def test_lists_and_units_are_right(rows):
    """The answers that a reader cannot check at a glance, worked out anew from the prompt's own text."""
    checked = Counter()
    thousandth = {'kilograms': 'grams', 'kilometers': 'meters', 'liters': 'milliliters', 'meters': 'millimeters'}
    for row in rows['demo.json']:
        text = f'{row["instruction"]} {row["input"]}'.lower()
        answer = row['output'].lower()
        asked = [int(n) for n in re.findall(r'\d+', text)]
        family = row.get('family')
        if family == 'units':
            assert answer == f'that is {asked[0]},000 {thousandth[re.search("[0-9]+ ([a-z]+) to", text)[1]]}.', row
        elif row['input'] and family == 'counting':
            listed = row['input'].split(', ')
            assert answer.split()[2] == 'zero one two three four five six seven eight'.split()[len(listed)], row
        elif row['input'] and family == 'picking' and re.search('first|last', text):
            assert answer.removesuffix('.').split()[-1] == row['input'].lower().split(', ')[0 if 'first' in text else -1], row
        elif row['input'] and family == 'repeating':
            assert answer.rstrip('.') == row['input'].lower().rstrip('.'), row
        else:
            continue
        checked[family] += 1
    names = 'units', 'counting', 'picking', 'repeating'
    assert min(checked[name] for name in names) > 300, checked
