"""Answers through sample.py's own command: after and before, one prompt, a conversation, an interrupted start, two processes."""
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROWS, TINY, TORCHRUN, stage

from model import GPT, GPTConfig
from prepare import detokenize, encode_prompt

AFTER, BEFORE = 'instruction-data-with-response.json', 'instruction-data-with-response-before.json'
FLAGS = '--dataset=tiny', '--out_dir=a', '--init_from=scratch', '--max_new_tokens=24'


@pytest.fixture(scope='module')
def trained(prepared, tmp_path_factory):
    """A folder with a run in a/ that has begun to answer, and its data."""
    folder = tmp_path_factory.mktemp('trained')
    shutil.copytree(prepared / 'data', folder / 'data')
    stage(folder, 'train.py', *TINY, '--dataset=tiny', '--out_dir=a', '--max_steps=60', '--learning_rate=1e-2',
          '--seed=7')
    return folder


@pytest.fixture
def sample(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def sample(*flags, launcher=(), **kwargs):
        sample.shown = stage(tmp_path, *launcher, 'sample.py', *FLAGS, *flags, **kwargs)
        return [json.loads((tmp_path / 'a' / name).read_text()) if (tmp_path / 'a' / name).exists() else []
                for name in (AFTER, BEFORE)]
    return sample


def naive(model, prompt, limit=24):
    """Greedy, one prompt at a time, without a cache -> (text, hit the limit)."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + limit, model.config.block_size):
        new = model(torch.tensor([ids]))[0][0, -1].argmax().item()
        if new == 50256:
            return detokenize(ids[len(prompt):]), False
        ids.append(new)
    return detokenize(ids[len(prompt):]), True


def test_predictions_after_and_before(sample, tmp_path):
    after, before = sample()
    test = json.loads((tmp_path / 'data/tiny/test.json').read_text())
    model = GPT.from_pretrained(tmp_path / 'a').eval()
    torch.manual_seed(7)  # the run's own seed and shape, not sample.py's
    origin = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128)).eval()
    assert 'step 60, val loss' in sample.shown.stdout and 'gpt2-2x32-sft.pth' in sample.shown.stdout
    for rows, network in ((after, model), (before, origin)):
        assert [{key: row[key] for key in source} for row, source in zip(rows, test['rows'])] == test['rows']
        for row in rows:
            text, truncated = naive(network, encode_prompt(row))
            assert row['model_response'] == text.strip().removeprefix('### Response:').strip()
            assert row['truncated'] == truncated
            ids = torch.tensor([encode_prompt(row)])
            assert row['reference_tokens'] > 0 and row['reference_loss'] > 0 and ids.shape[1] < 128
    assert any(not row['truncated'] for row in after) and all(row['truncated'] for row in before)
    assert sum(row['reference_loss'] for row in after) < sum(row['reference_loss'] for row in before)


def test_reference_loss(sample, tmp_path):
    after, _ = sample('--before=False')
    model = GPT.from_pretrained(tmp_path / 'a').eval()
    for row in after[:3]:
        prompt = encode_prompt(row)
        from prepare import get_tokenizer
        ids = torch.tensor([prompt + get_tokenizer().encode_ordinary(row['output']) + [50256]])
        logits = model(ids)[0][0].log_softmax(-1)
        nats = -logits[len(prompt) - 1:-1].gather(1, ids[0, len(prompt):, None]).mean().item()
        assert row['reference_loss'] == pytest.approx(nats, rel=1e-4) and row['reference_tokens'] == ids.shape[1] - len(prompt)


def test_one_prompt(sample, tmp_path):
    sample('--prompt=Write the word cat again.', '--input=dog')
    text = naive(GPT.from_pretrained(tmp_path / 'a').eval(), encode_prompt({'instruction': 'Write the word cat again.', 'input': 'dog'}))
    assert sample.shown.stdout.rstrip().endswith(text[0].strip())
    assert not (tmp_path / 'a' / AFTER).exists()


def test_a_conversation(trained):
    shown = stage(trained, 'sample.py', *FLAGS, '--interactive=True',
                  input=f'Write the word cat again.\n{"long " * 999}\nWrite the word dog again. | cat\n\nleft\n')
    rows = {'instruction': 'Write the word cat again.'}, {'instruction': 'Write the word dog again.', 'input': 'cat'}
    model = GPT.from_pretrained(trained / 'a').eval()
    answers = [naive(model, encode_prompt(row))[0].strip() for row in rows]
    assert re.search(re.escape(f'> {answers[0]}') + r'\n> .* tokens; it may have .*\n> ' + re.escape(f'{answers[1]}\n> ') + '$', shown.stdout)


def test_an_untrained_checkpoint_answers(trained, tmp_path):
    """--init_from=<a path> with no run at all; and with a run, another model than it came from."""
    text = naive(GPT.from_pretrained(trained / 'a').eval(), encode_prompt({'instruction': 'Hello'}), 3)[0].strip()
    shown = stage(tmp_path, 'sample.py', '--out_dir=none', f'--init_from={trained / "a"}', '--prompt=Hello', '--max_new_tokens=3')
    assert shown.stdout.endswith(f'{text}\n')
    assert 'none has no run' in stage(tmp_path, 'sample.py', '--out_dir=none', '--init_from=scratch', '--prompt=Hello', code=2).stderr
    stage(tmp_path, 'sample.py', '--out_dir=none', '--init_from=absent', '--prompt=Hello', code=2)
    stage(tmp_path, 'sample.py', '--max_new_tokens=0', '--prompt=Hello', code=2)
    path = trained / 'a/gpt2-2x32-sft.pth'
    ask = f'--out_dir={trained / "a"}', '--prompt=Hello', '--max_new_tokens=3'
    assert f'\nloaded {path}: ' in stage(tmp_path, 'sample.py', *ask, f'--init_from={path}').stdout
    # a flag counts, even that of the default; a config file that other runs are made with does not
    (tmp_path / 'other.py').write_text(f'init_from = {str(path)!r}')
    assert 'sft.pth (step' in stage(tmp_path, 'sample.py', 'other.py', *ask).stdout
    shown = stage(tmp_path, 'sample.py', *ask, '--init_from=gpt2-medium', '--cache_dir=other.py', code=2)
    assert 'other.py' in shown.stderr and 'sft.pth' not in shown.stdout


def test_what_the_file_of_answers_is_called(trained, tmp_path):
    """A model in a folder of its own writes predictions; one that answers instead of a run does not overwrite the run's."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'a/gpt2-2x32-sft.pth'
    ask = '--dataset=tiny', '--max_new_tokens=2', f'--init_from={path}'
    for folder, name in ('alone', AFTER), ('a', BEFORE):
        stage(tmp_path, 'sample.py', *ask, f'--out_dir={folder}')
        assert [file.name for file in (tmp_path / folder).glob('instruction*.json') if 'about' not in file.name] == [name]


def test_an_interrupted_start_is_resumed(sample, tmp_path):
    whole, _ = sample('--before=False')
    (tmp_path / 'a' / AFTER).unlink()
    # killed after its second row: what it answered is not asked again
    sample('--before=False', code=9, first="""
import os, model
original = model.GPT.generate
def generate(self, prompts, *args, on_done=None, **kwargs):
    def die_at_the_third(i, ids, count=[0]):
        count[0] += 1
        os._exit(9) if count[0] == 3 else on_done(i, ids)
    return original(self, prompts, *args, on_done=die_at_the_third, **kwargs)
model.GPT.generate = generate
""")
    part = next((tmp_path / 'a').glob('*.part0'))
    part.write_text(part.read_text() + '{"key": "cut')  # the line at which it was killed
    again, _ = sample('--before=False')
    assert again == whole and f'2 of {len(whole)} answers are there already' in sample.shown.stdout
    assert not list((tmp_path / 'a').glob('*.part*'))


def test_float16_on_a_cpu(sample):
    """The matrices are rounded, to 11 bits: the same answers, nearly the same losses."""
    exact, half = sample('--before=False')[0], sample('--before=False', '--dtype=float16')[0]
    equal = sum(a['model_response'] == b['model_response'] for a, b in zip(exact, half))
    assert equal >= len(exact) - 1 and half != exact
    assert [row['reference_loss'] for row in half] == pytest.approx([row['reference_loss'] for row in exact], rel=1e-2)


def test_two_processes_share_the_prompts(sample):
    one = sample('--before=False')[0]
    two = sample('--before=False', launcher=TORCHRUN)[0]
    assert [row['model_response'] for row in one] == [row['model_response'] for row in two]
    assert [row['reference_loss'] for row in one] == pytest.approx([row['reference_loss'] for row in two], rel=1e-5)


def test_sampling_depends_on_the_seed(sample):
    def responses(*flags):
        return [row['model_response'] for row in sample('--before=False', '--temperature=1.0', '--top_k=50', *flags)[0]]
    assert responses('--seed=1') == responses('--seed=1') != responses('--seed=2')


def test_an_adapter_on_its_base(trained, tmp_path):
    """Base + adapter.safetensors answers as the merged <model>-sft.pth does, and fits no other shape."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    base = tmp_path / 'a/gpt2-2x32-sft.pth'
    lora = [flag for flag in TINY if 'init_from' not in flag] + [f'--init_from={base}', '--dataset=tiny', '--lora_rank=4']
    stage(tmp_path, 'train.py', *lora, '--out_dir=b', '--max_steps=20', '--learning_rate=1e-2')
    assert (tmp_path / 'b/adapter.safetensors').stat().st_size < 40_000
    ask = '--dataset=tiny', '--max_new_tokens=24', f'--init_from={base}'
    stage(tmp_path, 'sample.py', *ask, '--out_dir=b')
    stage(tmp_path, 'sample.py', *ask, '--out_dir=c', '--adapter=b/adapter.safetensors')
    merged, put_on, before = (json.loads((tmp_path / name).read_text()) for name in (f'b/{AFTER}', f'c/{AFTER}', f'b/{BEFORE}'))
    assert [row['model_response'] for row in merged] == [row['model_response'] for row in put_on]
    assert [row['reference_loss'] for row in merged] == pytest.approx([row['reference_loss'] for row in put_on], rel=1e-4)
    assert [row['reference_loss'] for row in merged] != pytest.approx([row['reference_loss'] for row in before], rel=1e-3)


# --- labels by self-consistency

def candidates(*texts, truncated=()):
    return [{'model_response': text, 'truncated': n in truncated} for n, text in enumerate(texts)]


@pytest.mark.parametrize('answers, expected', [
    (candidates('a', 'b', 'b', 'c'), ('b', 0.5)),
    (candidates('b', 'a', 'a', 'b'), ('b', 0.5)),  # a tie: sampled first
    (candidates('The  Cat.', 'the cat', 'the cat', 'A dog'), ('the cat', 0.75)),  # one vote, in its commonest words
    (candidates('3', '-3', '3.5', '3.'), ('3', 0.5)),  # a sign is no punctuation to be ignored
    (candidates('', '', '', 'a'), ('a', 0.25)),  # an empty answer has no vote but counts
    (candidates('a', 'a', 'b', 'b', 'b', truncated=(2, 3)), ('a', 0.4)),  # as one that was cut
    (candidates('', 'x', truncated=(1,)), ('', 0.0)),
    (candidates('.', '.'), ('.', 1.0)),
])
def test_vote(answers, expected):
    from sample import vote
    assert vote(answers) == expected


def test_labels_are_the_majority_of_samples(sample, tmp_path):
    rows = [{'q': row['instruction'], 'input': row.get('input') or '', 'id': n} for n, row in enumerate(ROWS[:12])]
    rows = [{'instruction': row.pop('q'), **row} for row in rows]
    for row, source in zip(rows[:8], ROWS):
        row['output'] = source['output']
    (tmp_path / 'ask.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    flags = '--self_consistency=5', '--prompts=ask.jsonl', '--seed=3', '--max_new_tokens=12'
    sample(*flags, '--min_agreement=0')
    shown, found = sample.shown.stdout, json.loads((tmp_path / 'a/pseudo-labels.json').read_text())
    about = json.loads((tmp_path / 'a/pseudo-labels.about.json').read_text())
    assert about['config']['temperature'] == 0.7 and about['labelled'] == 12 - about['left_out'] == len(found) and not list((tmp_path / 'a').glob('*.part*'))
    # the candidates, by a call for each seed
    model = GPT.from_pretrained(tmp_path / 'a').eval()
    by_seed = [model.generate([encode_prompt(row) for row in rows], 12, 0.7, seed=3 + n) for n in range(5)]
    texts = [[detokenize(answers[i]).strip().removeprefix('### Response:').strip() for answers in by_seed] for i in range(12)]
    cut = [[len(answers[i]) == 12 for answers in by_seed] for i in range(12)]
    assert len({text for row in texts for text in row}) > 5
    by_id = {row['id']: row for row in found}
    for i, row in enumerate(rows):
        whole = [' '.join(text.lower().split()).rstrip('.') for text, is_cut in zip(texts[i], cut[i]) if text and not is_cut]
        assert (i in by_id) == bool(whole)
        if whole:
            most = max(map(whole.count, whole))
            label = ' '.join(by_id[i]['output'].lower().split()).rstrip('.')
            assert whole.count(label) == most and by_id[i]['agreement'] == most / 5
            assert by_id[i]['candidates'] == texts[i] and by_id[i]['truncated'] == sum(cut[i]) and by_id[i]['instruction'] == row['instruction']
            assert by_id[i].get('reference') == row.get('output')
    assert f'{len(found)} of 12 rows got a label' in shown and len(found) > 4
    assert sum(line['rows'] for line in about['reliability']) == 8 and 'agreement     rows  right' in shown
    # a bound leaves some out; the same samples, from the part file of a run that was killed
    sample(*flags, '--min_agreement=0.8')
    some = json.loads((tmp_path / 'a/pseudo-labels.json').read_text())
    assert some == [row for row in found if row['agreement'] >= 0.8] and f'{len(some)} of 12 rows' in sample.shown.stdout
    # the file is a source for prepare.py
    (tmp_path / 'labelled.json').write_text(json.dumps(ROWS[20:]))
    sample(*flags, '--min_agreement=0')
    shown = stage(tmp_path, 'prepare.py', '--source=labelled.json,a/pseudo-labels.json', '--dataset=both', '--block_size=128').stdout
    counts = [int(n) for n in shown.split('rows of a/pseudo-labels.json')[1].split('\n')[0].split()]
    assert sum(counts) == len(found)


def test_labelling_is_resumed(sample, tmp_path):
    (tmp_path / 'ask.json').write_text(json.dumps(ROWS[:9]))
    flags = '--self_consistency=3', '--prompts=ask.json', '--max_new_tokens=8', '--min_agreement=0'
    sample(*flags, code=9, first="""
import os, tqdm
count, update = [0], tqdm.tqdm.update
def stop(self, n=1):
    count[0] += 1
    os._exit(9) if count[0] == 14 else update(self, n)
tqdm.tqdm.update = stop
""")
    assert (tmp_path / 'a/pseudo-labels.part0').read_text().count('model_response') == 14
    assert not (tmp_path / 'a/pseudo-labels.json').exists()
    sample(*flags)
    assert '14 of 27 answers are there already' in sample.shown.stdout
    resumed = (tmp_path / 'a/pseudo-labels.json').read_bytes()
    sample(*flags, processes=2)
    assert (tmp_path / 'a/pseudo-labels.json').read_bytes() == resumed


@pytest.mark.parametrize('flags, said', [
    (['--self_consistency=3'], 'need both'), (['--prompts=ask.json'], 'need both'), (['--self_consistency=-1'], 'at least 0'),
    (['--self_consistency=3', '--prompts=absent.json'], 'cannot read absent.json'),
    (['--self_consistency=3', '--prompts=ask.json'], 'row 1: instruction is 5; row 2: output is 7'),
])
def test_mistakes_about_labels(sample, tmp_path, flags, said):
    (tmp_path / 'ask.json').write_text('[{"instruction": "x", "output": "y"}, {"instruction": 5, "output": "y"}, '
                                       '{"instruction": "x", "output": 7}]')
    sample(*flags, code=2)
    assert said in sample.shown.stderr and not list((tmp_path / 'a').glob('pseudo*'))


def test_without_scipy_labels_are_not_compared(monkeypatch, capsys):
    from sample import reliability
    rows = [{'output': 'a', 'reference': 'a', 'agreement': 0.5}, {'output': 'b', 'reference': 'a', 'agreement': 1.0}]
    assert [(line['rows'], line['right']['value']) for line in reliability(rows)] == [(1, 1.0), (1, 0.0)]
    monkeypatch.setitem(sys.modules, 'scipy.stats', None)
    assert reliability(rows) == [] and 'pip install scipy' in capsys.readouterr().out
