"""Answers through sample.py's own command: after and before, one prompt, a conversation, an interrupted start, two processes."""
import json
import re
import shutil

import sample as sample_stage
from config import Config, UserError, sha256_of_file
from model import GPT, GPTConfig
from prepare import detokenize, encode_prompt, get_tokenizer

import pytest
import torch
from conftest import TINY, stage

AFTER = 'instruction-data-with-response.json'
BEFORE = 'instruction-data-with-response-before.json'
FLAGS = '--dataset=tiny', '--out_dir=a', '--init_from=scratch', '--max_new_tokens=24'


@pytest.fixture(scope='module')
def trained(prepared, tmp_path_factory):
    """A folder with a run in a/ that has begun to answer, and its data."""
    folder = tmp_path_factory.mktemp('trained')
    shutil.copytree(prepared / 'data', folder / 'data')
    stage(folder, 'train.py', *TINY, '--dataset=tiny', '--out_dir=a', '--max_steps=60', '--learning_rate=1e-2', '--seed=7')
    return folder


@pytest.fixture(scope='module')
def model(trained):
    """The run's model."""
    return GPT.from_pretrained(trained / 'a').eval()


@pytest.fixture
def sample(trained, tmp_path):
    """sample(*flags) -> the predictions after and before, in a copy of the folder; sample.shown: what it printed."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def sample(*flags, **kwargs):
        sample.shown = stage(tmp_path, 'sample.py', *FLAGS, *flags, **kwargs)
        paths = [tmp_path / 'a' / name for name in (AFTER, BEFORE)]
        return [json.loads(path.read_text()) if path.exists() else [] for path in paths]
    return sample


def answer(model, row, limit=24):
    """(the text, whether it met the limit) by model.generate, which is the definition."""
    ids = model.generate(encode_prompt(row), limit)
    return detokenize(ids).strip(), len(ids) == min(limit, model.config.block_size - len(encode_prompt(row)))


# --- the test split


def test_predictions_after_and_before(sample, model, tmp_path):
    after, before = sample()
    test = json.loads((tmp_path / 'data/tiny/test.json').read_text())
    torch.manual_seed(7)  # the run's own seed and shape, not sample.py's
    origin = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128)).eval()
    assert 'loaded a/gpt2-2x32-sft.pth (step 60, val loss ' in sample.shown.stdout
    for rows, network in ((after, model), (before, origin)):
        assert [{key: row[key] for key in source} for row, source in zip(rows, test['rows'])] == test['rows']
        for row in rows:
            assert (row['model_response'], row['truncated']) == answer(network, row)
    assert any(not row['truncated'] for row in after)
    assert all(row['truncated'] for row in before)
    assert sum(row['reference_loss'] for row in after) < sum(row['reference_loss'] for row in before)


def test_the_reference_loss_is_that_of_the_answer_and_its_end(sample, model):
    after, _ = sample('--before=False')
    for row in after[:3]:
        prompt = encode_prompt(row)
        ids = torch.tensor([prompt + get_tokenizer().encode_ordinary(row['output']) + [50256]])
        logits = model(ids)[0].log_softmax(-1)
        nats = -logits[len(prompt) - 1:-1].gather(1, ids[0, len(prompt):, None]).mean().item()
        assert row['reference_loss'] == pytest.approx(nats, rel=1e-4)
        assert row['reference_tokens'] == ids.shape[1] - len(prompt)


def test_predictions_say_what_they_were_made_of(sample, tmp_path):
    sample()
    run = json.loads((tmp_path / 'a/gpt2-2x32-sft.json').read_text())
    after = json.loads((tmp_path / 'a' / AFTER.replace('.json', '.about.json')).read_text())
    before = json.loads((tmp_path / 'a' / BEFORE.replace('.json', '.about.json')).read_text())
    assert after['sha256'] == sha256_of_file(tmp_path / 'a' / AFTER)
    assert after['made_of']['weights'] == run['weights']
    assert after['made_of']['base weights'] == before['made_of']['weights'] == run['made_of']['base weights']
    assert after['made_of']['data'] == before['made_of']['data'] == run['made_of']['data']
    assert after['config']['max_new_tokens'] == 24


def test_a_header_that_the_model_says_again_is_no_answer():
    def response(text):
        return sample_stage.response_text(get_tokenizer().encode_ordinary(text))
    assert response('\n\n### Response:\nThe cat.') == 'The cat.'
    assert response(' It is\n\n### Response:\nlike this. ') == 'It is\n\n### Response:\nlike this.'


def test_an_interrupted_start_is_resumed(sample, tmp_path):
    whole, _ = sample('--before=False')
    (tmp_path / 'a' / AFTER).unlink()
    # killed at its third answer: the two that are there are not computed again
    sample('--before=False', code=9, first="""
import itertools, os, engine
generate = engine.generate
count = itertools.count()

def die_at_the_third(*args, on_done, **kwargs):
    def on_done_or_die(i, ids):
        if next(count) == 2:
            os._exit(9)
        on_done(i, ids)
    return generate(*args, on_done=on_done_or_die, **kwargs)

engine.generate = die_at_the_third
""")
    part = next((tmp_path / 'a').glob('*.part0'))
    part.write_text(part.read_text() + '{"key": "cut')  # the line at which it was killed
    again, _ = sample('--before=False')
    assert again == whole
    assert f'2 of {len(whole)} answers are there already' in sample.shown.stdout
    assert not list((tmp_path / 'a').glob('*.part*'))


def test_two_processes_share_the_prompts(sample):
    alone, _ = sample('--before=False')
    shared, _ = sample('--before=False', processes=2)
    assert [row['model_response'] for row in alone] == [row['model_response'] for row in shared]
    assert [row['reference_loss'] for row in alone] == pytest.approx([row['reference_loss'] for row in shared], rel=1e-5)


@pytest.mark.parametrize('dtype, error', [('float16', 1e-2), ('bfloat16', 5e-2)])
def test_half_precision_on_a_cpu(sample, dtype, error):
    """The matrices are rounded, to 11 or 8 bits: nearly the same losses, and nearly all answers."""
    exact, _ = sample('--before=False')
    half, _ = sample('--before=False', f'--dtype={dtype}')
    n_equal = sum(a['model_response'] == b['model_response'] for a, b in zip(exact, half))
    assert n_equal >= len(exact) - 2
    assert half != exact
    assert [row['reference_loss'] for row in half] == pytest.approx([row['reference_loss'] for row in exact], rel=error)


def test_sampling_depends_on_the_seed(sample):
    def responses(*flags):
        return [row['model_response'] for row in sample('--before=False', '--temperature=1.0', '--top_k=50', *flags)[0]]
    assert responses('--seed=1') == responses('--seed=1') != responses('--seed=2')


def test_a_test_row_that_the_model_has_no_room_for_is_told_before_any_answer(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    small = sample_stage.Loaded(GPT(GPTConfig(block_size=40, vocab_size=9, n_layer=1, n_head=1, n_embd=4)), 'small', {})
    with pytest.raises(UserError, match=r'data/tiny has a test row of \d+ tokens, the model 40 positions; prepare the data again with --block_size=40'):
        sample_stage.read_test_split({'dataset': 'tiny', 'other_data': False}, small)


def test_an_adapter_on_its_base_answers_as_the_merged_model(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    base = tmp_path / 'a/gpt2-2x32-sft.pth'
    lora = [flag for flag in TINY if 'init_from' not in flag] + [f'--init_from={base}', '--dataset=tiny', '--lora_rank=4']
    stage(tmp_path, 'train.py', *lora, '--out_dir=b', '--max_steps=20', '--learning_rate=1e-2')
    assert (tmp_path / 'b/adapter.safetensors').stat().st_size < 40_000
    ask = '--dataset=tiny', '--max_new_tokens=24', f'--init_from={base}'
    stage(tmp_path, 'sample.py', *ask, '--out_dir=b')
    stage(tmp_path, 'sample.py', *ask, '--out_dir=c', '--adapter=b/adapter.safetensors')
    merged, put_on, before = (json.loads((tmp_path / name).read_text()) for name in (f'b/{AFTER}', f'c/{AFTER}', f'b/{BEFORE}'))
    losses = [row['reference_loss'] for row in merged]
    assert [row['model_response'] for row in merged] == [row['model_response'] for row in put_on]
    assert losses == pytest.approx([row['reference_loss'] for row in put_on], rel=1e-4)
    assert losses != pytest.approx([row['reference_loss'] for row in before], rel=1e-3)


# --- which model answers


# what out_dir holds, the flags and the config files that set init_from, and what answers: the run, or the model that is named
@pytest.mark.parametrize('has_run, flag, file, found', [
    (True, '', '', 'run'),
    (True, '', 'gpt2-large', 'run'),  # a config file that other runs are made with
    (True, 'out/base', '', 'run'),  # the model that it came from
    (True, 'resume', '', 'run'),  # the flag with which it was resumed
    (True, 'gpt2', '', 'named'),
    (True, 'gpt2-medium', '', 'named'),  # a flag counts, even that of the default
    (False, 'gpt2', '', 'named'),
    (False, '', 'gpt2', 'named'),
    (False, '', '', 'out has no run: train one with python train.py, or name a model'),
    (False, 'scratch', '', 'out has no run'),
    (False, '', 'scratch', 'out has no run'),
    (None, '', '', 'out does not exist: train one'),
])
def test_the_run_answers_unless_a_flag_names_another_model(tmp_path, monkeypatch, has_run, flag, file, found):
    monkeypatch.chdir(tmp_path)
    if has_run is not None:
        (tmp_path / 'out').mkdir()
    if has_run:
        (tmp_path / 'out/gpt2-sft.json').write_text('{"init_from": "out/base"}')
    config = Config(out_dir='out', init_from=flag or file or 'gpt2-medium')
    config.flags = {'init_from'} if flag else set()
    config.files = {'init_from'} if file else set()
    if found not in ('run', 'named'):
        with pytest.raises(UserError, match=found):
            sample_stage.find_run(config)
    else:
        assert (sample_stage.find_run(config) is not None) == (found == 'run')


@pytest.mark.parametrize('text', ['[]', '{}', '7', '{'])
def test_a_run_whose_json_is_something_else_is_told(sample, tmp_path, text):
    path, = (tmp_path / 'a').glob('*-sft.json')
    path.write_text(text)
    sample('--prompt=Say it.', code=2)
    assert f'{path.name} is not the .json of a run' in sample.shown.stderr or f'cannot read a/{path.name}' in sample.shown.stderr


def test_a_model_that_was_not_trained_here_answers(trained, model, tmp_path):
    text, _ = answer(model, {'instruction': 'Hello'}, 3)
    ask = '--out_dir=none', '--prompt=Hello', '--max_new_tokens=3'
    shown = stage(tmp_path, 'sample.py', *ask, f'--init_from={trained / "a"}').stdout
    assert shown.endswith(f'{text}\n')
    assert not (tmp_path / 'none').exists()
    assert 'absent' in stage(tmp_path, 'sample.py', *ask, '--init_from=absent', code=2).stderr


def test_what_answers_instead_of_a_run_does_not_overwrite_the_runs_answers(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / 'a', tmp_path / 'other')
    for folder, name in ('alone', AFTER), ('a', BEFORE):
        stage(tmp_path, 'sample.py', '--dataset=tiny', '--max_new_tokens=2', '--init_from=other', f'--out_dir={folder}')
        assert [file.name for file in (tmp_path / folder).glob('instruction*.json') if 'about' not in file.name] == [name]


# --- other forms of asking


def test_one_prompt(sample, model, tmp_path):
    sample('--prompt=Write the word cat again.', '--input=dog')
    text, _ = answer(model, {'instruction': 'Write the word cat again.', 'input': 'dog'})
    assert sample.shown.stdout.endswith(f'\n{text}\n')
    assert not (tmp_path / 'a' / AFTER).exists()


def test_a_conversation(trained, model):
    """It begins with examples of what the model was trained for; a line that is too long does not end it."""
    lines = 'Write the word cat again.', 'long ' * 999, 'Write the word dog again. | cat', '', 'left'
    shown = stage(trained, 'sample.py', *FLAGS, '--interactive=True', input='\n'.join(lines)).stdout
    cat, _ = answer(model, {'instruction': 'Write the word cat again.'})
    dog, _ = answer(model, {'instruction': 'Write the word dog again.', 'input': 'cat'})
    assert re.search(re.escape(f'> {cat}') + r'\n> .* tokens; it may have .*\n> ' + re.escape(f'{dog}\n> ') + '$', shown)
    rows = json.loads((trained / 'data/tiny/test.json').read_text())['rows']
    example = re.search('for example:\n  (.*)', shown)[1]
    assert example.partition(' | ')[0] in [row['instruction'].replace('\n', ' ') for row in rows]


def test_a_conversation_names_the_families_of_the_rows(capsys):
    """A column of that name may hold anything, and rows without one are no task."""
    rows = [{'instruction': 'Hello.'}, {'instruction': 'Add.', 'input': '1\n2', 'family': 'sums'}, {'instruction': 'Add.', 'family': [7]},
            {'instruction': 'Spell.', 'family': 'letters'}]
    sample_stage.show_examples(rows)
    assert capsys.readouterr().out == 'it knows these tasks: letters, sums\nfor example:\n  Add. | 1 2\n  Spell.\n'
    sample_stage.show_examples([{'instruction': 'Name it.', 'input': 'x'}, {'instruction': 'Name it.'}, {'instruction': 'Say it.'}])
    assert capsys.readouterr().out == 'for example:\n  Name it.\n  Say it.\n'


def test_questions_are_answered_in_their_first_turn(sample, model, tmp_path):
    questions = [{'id': 1, 'category': 'a', 'turns': ['Write the word cat\u2028 again.', 'And now?']}, {'id': 2, 'turns': ['Say it.']}]
    text = '\ufeff' + '\n'.join(json.dumps(question, ensure_ascii=False) for question in questions) + '\n\n'
    (tmp_path / 'questions.jsonl').write_text(text, encoding='utf-8')
    sample('--questions=questions.jsonl')
    found = json.loads((tmp_path / 'a/question-answers.json').read_text())
    assert [{key: value for key, value in row.items() if key != 'answers'} for row in found] == questions
    assert [row['answers'] for row in found] == [[answer(model, {'instruction': question['turns'][0]})[0]] for question in questions]


@pytest.mark.parametrize('line', ['{"turns": []}', '{"turn": ["x"]}', '{"turns": "x"', '7'])
def test_a_file_that_holds_no_questions_is_told(sample, tmp_path, line):
    (tmp_path / 'questions.jsonl').write_text('{"turns": ["Say it."]}\n' + line)
    sample('--questions=questions.jsonl', code=2)
    assert 'questions.jsonl is not a JSONL of questions with turns' in sample.shown.stderr
    (tmp_path / 'questions.jsonl').write_text('')
    sample('--questions=questions.jsonl', code=2)
    assert 'it is empty' in sample.shown.stderr


@pytest.mark.parametrize('flags, said', [
    (['--input=The cat.'], '--input goes with --prompt'),
    (['--prompt=Say it.', '--interactive=True'], 'prompt and interactive do not go together'),
    (['--prompt=Say it.', '--questions=questions.jsonl'], 'prompt and questions do not go together'),
])
def test_a_flag_that_would_not_be_heeded_is_told(sample, tmp_path, flags, said):
    sample(*flags, code=2)
    assert said in sample.shown.stderr and not list((tmp_path / 'a').glob('*response*'))


def test_several_processes_answer_the_test_split_alone(sample):
    sample('--prompt=Say it.', code=2, processes=2)
    assert 'several processes share the test split' in sample.shown.stderr
