"""Labels by self-consistency, through label.py's own command: the vote, what agreement is worth, an interrupted start."""
import itertools
import json
import shutil

from engine import generate
from label import reliability, vote
from model import GPT
from prepare import detokenize, encode_prompt

import pytest
from conftest import ROWS, TINY, stage
from test_rows import figures

N_ROWS = 12  # of which the first eight have an output


@pytest.fixture(scope='module')
def trained(prepared, tmp_path_factory):
    """A folder with a run in a/ that has begun to answer, and rows to be labelled."""
    folder = tmp_path_factory.mktemp('trained')
    shutil.copytree(prepared / 'data', folder / 'data')
    stage(folder, 'train.py', *TINY, '--dataset=tiny', '--out_dir=a', '--max_steps=60', '--learning_rate=1e-2', '--seed=7')
    rows = [{'instruction': row['instruction'], 'input': row.get('input') or '', 'id': n} for n, row in enumerate(ROWS[:N_ROWS])]
    for row, source in zip(rows[:8], ROWS):
        row['output'] = source['output']
    rows[9]['reference'] = ['of the file, as in MT-bench', 'and no output']
    (folder / 'ask.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def label(trained, tmp_path):
    """label(*flags) -> (what it printed, the labelled rows), in a copy of the folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def label(*flags, **kwargs):
        done = stage(tmp_path, 'label.py', '--out_dir=a', '--label_rows=ask.jsonl', '--max_new_tokens=12', *flags, **kwargs)
        path = tmp_path / 'a/pseudo-labels.json'
        return done, json.loads(path.read_text()) if path.exists() else None
    return label


# --- the vote


def candidates(*texts, truncated=()):
    return [{'model_response': text, 'truncated': n in truncated} for n, text in enumerate(texts)]


@pytest.mark.parametrize('answers, label_and_agreement', [
    (candidates('a', 'b', 'b', 'c'), ('b', 0.5)),
    (candidates('b', 'a', 'a', 'b'), ('b', 0.5)),  # of a tie the answer sampled first
    (candidates('The  Cat.', 'the cat', 'the cat', 'A dog'), ('the cat', 0.75)),  # one vote, in its commonest words
    (candidates('3', '-3', '3.5', '3.'), ('3', 0.5)),  # a sign is no punctuation to be ignored
    (candidates('', '', '', 'a'), ('a', 0.25)),  # an empty answer has no vote but counts
    (candidates('a', 'a', 'b', 'b', 'b', truncated=(2, 3)), ('a', 0.4)),  # as one that was cut
    (candidates('', 'x', truncated=(1,)), ('', 0.0)),
    (candidates('.', '.'), ('.', 1.0)),
])
def test_most_answers_win(answers, label_and_agreement):
    assert vote(answers) == label_and_agreement


# --- what agreement is worth


def test_the_share_of_right_labels_by_agreement():
    def rows(agreement, n_right, n_wrong):
        return [{'agreement': agreement, 'output': 'a ', 'reference': 'a' if n < n_right else 'b'} for n in range(n_right + n_wrong)]
    table = reliability(rows(0.2, 1, 3) + rows(0.5, 2, 2) + rows(0.6, 1, 0) + rows(1.0, 9, 1))
    assert [(line['from'], line['to'], line['rows'], line['right']['value']) for line in table] == [
        (0, 0.25, 4, 0.25), (0.5, 0.75, 5, 0.6), (1, 1, 10, 0.9)]
    assert (table[2]['right']['low'], table[2]['right']['high']) == pytest.approx((0.596, 0.982), abs=1e-3)  # Wilson's
    # as in the vote, case and a full stop do not matter
    assert reliability([{'output': 'A cat.', 'reference': 'a cat', 'agreement': 0.5}])[0]['right']['value'] == 1


# --- through the command


def test_labels_are_what_most_samples_say(label, trained, tmp_path):
    done, found = label('--self_consistency=5', '--seed=3', '--min_agreement=0')
    about = json.loads((tmp_path / 'a/pseudo-labels.about.json').read_text())
    assert about['config']['label_temperature'] == 0.7
    assert about['labelled'] == N_ROWS - about['left_out'] == len(found)
    assert not list((tmp_path / 'a').glob('*.part*'))
    # the candidates, by a call for each seed
    rows = [json.loads(line) for line in (trained / 'ask.jsonl').read_text().splitlines()]
    model = GPT.from_pretrained(trained / 'a').eval()
    prompts = [encode_prompt(row) for row in rows]
    by_seed = [generate(model, prompts, 12, 0.7, seed=3 + n) for n in range(5)]
    by_id = {row['id']: row for row in found}
    for i, row in enumerate(rows):
        texts = [detokenize(answers[i]).strip() for answers in by_seed]
        is_cut = [len(answers[i]) == 12 for answers in by_seed]
        output, agreement = vote([{'model_response': text, 'truncated': cut} for text, cut in zip(texts, is_cut)])
        assert (i in by_id) == bool(output)
        if output:
            assert (by_id[i]['output'], by_id[i]['agreement']) == (output, agreement)
            assert by_id[i]['candidates'] == texts
            assert by_id[i]['truncated'] == sum(is_cut)
            assert by_id[i].get('reference') == row.get('output')
    assert len(set(itertools.chain.from_iterable(row['candidates'] for row in found))) > 5
    assert f'{len(found)} of 12 rows got a label' in done.stdout and len(found) > 4
    # the rows that had an output check the labels
    assert sum(line['rows'] for line in about['reliability']) == 8
    assert 'agreement     rows  right' in done.stdout
    # a bound leaves some out
    done, some = label('--self_consistency=5', '--seed=3', '--min_agreement=0.8')
    assert some == [row for row in found if row['agreement'] >= 0.8]
    assert f'{len(some)} of 12 rows' in done.stdout


def test_labels_are_a_source_for_prepare(label, tmp_path):
    _, found = label('--self_consistency=3', '--min_agreement=0')
    (tmp_path / 'labelled.json').write_text(json.dumps(ROWS[20:]))
    shown = stage(tmp_path, 'prepare.py', '--source=labelled.json,a/pseudo-labels.json', '--dataset=both', '--block_size=128').stdout
    assert sum(figures(shown, 'rows of a/pseudo-labels.json')) == len(found)


def test_labelling_is_resumed_and_shared(label, tmp_path):
    # killed at its 14th answer, which is there
    label('--self_consistency=3', '--min_agreement=0', code=9, first="""
import itertools, os, tqdm
update = tqdm.tqdm.update
count = itertools.count(1)

def update_or_die(bar, n=1):
    if next(count) == 14:
        os._exit(9)
    update(bar, n)

tqdm.tqdm.update = update_or_die
""")
    assert (tmp_path / 'a/pseudo-labels.part0').read_text().count('model_response') == 14
    assert not (tmp_path / 'a/pseudo-labels.json').exists()
    done, resumed = label('--self_consistency=3', '--min_agreement=0')
    assert '14 of 36 answers are there already' in done.stdout
    assert label('--self_consistency=3', '--min_agreement=0', processes=2)[1] == resumed


@pytest.mark.parametrize('flags, said', [
    (['--label_rows='], 'name the rows: --label_rows=unlabelled.json'),
    (['--label_rows=absent.json'], 'cannot read absent.json'),
    (['--label_rows=faulty.json'], 'row 1: instruction is not a text: 5; row 2: output is not a text: 7'),
    (['--self_consistency=0'], 'self_consistency=0 must be at least 1'),
    (['--label_temperature=0'], 'label_temperature=0.0 must be above 0'),
    (['--out_dir=absent'], 'absent does not exist'),
    (['--label_rows=long.json'], 'long.json: the prompt of row 1 has 231 tokens; it may have 1 to 127'),
])
def test_a_mistake_is_told_and_nothing_is_written(label, tmp_path, flags, said):
    (tmp_path / 'faulty.json').write_text(
        '[{"instruction": "x", "output": "y"}, {"instruction": 5, "output": "y"}, {"instruction": "x", "output": 7}]')
    (tmp_path / 'long.json').write_text(json.dumps([{'instruction': 'x'}, {'instruction': 'x ' * 200}]))
    done, found = label(*flags, code=2)
    assert said in done.stderr
    assert found is None
