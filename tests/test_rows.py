"""
Rows as people have them: what is read of each file and convention, and what is said of a row that cannot be read.

Most of it asks read_rows, which the stages call; the last part goes through prepare.py's own command.
"""
import gzip
import io
import json

import prepare
from config import UserError
from prepare import DECODER, SPLITS, Fault, get_tokenizer, normalize, read_rows, to_row

import pyarrow
import pytest
from pyarrow import parquet

PLAIN = [{'instruction': f'Task {i}', 'input': 'x' * (i % 3), 'output': f'Answer {i}'} for i in range(60)]
ROW = {'instruction': 'Name it.', 'input': 'a thing', 'output': 'It.'}
USER = {'role': 'user', 'content': 'Name it.'}
ASSISTANT = {'role': 'assistant', 'content': 'It.'}
CALL = {'role': 'assistant', 'content': '', 'tool_calls': [{'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}]}
TOOL = {'role': 'tool', 'tool_call_id': 'c', 'content': '7'}


def write(path, rows):
    """Rows in the format that the file's name ends in."""
    text = json.dumps(rows)
    if '.jsonl' in path.name:
        text = '\n'.join(map(json.dumps, rows)) + '\n\n'
    if path.suffix == '.gz':
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == '.parquet':
        # a table has all columns, with null where a row has no such field
        names = dict.fromkeys(name for row in rows for name in row)
        parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)
    else:
        path.write_text(text)


def figures(shown, name):
    """The figures of a line of the table that prepare.py prints: of train, val and test."""
    return [int(figure.replace(',', '')) for figure in shown.split(f'\n{name} ')[1].split('\n')[0].split()]


def splits_of(folder, dataset):
    """{split: (bytes of the .bin, the .json)}."""
    folder = folder / 'data' / dataset
    return {split: ((folder / f'{split}.bin').read_bytes(), json.loads((folder / f'{split}.json').read_text())) for split in SPLITS}


@pytest.fixture
def read(tmp_path):
    """read(text or rows, ...) -> the rows of a file that holds them, as a list; read.error(...) -> what is said instead."""

    def read(content, name='rows.jsonl', **options):
        path = tmp_path / name
        if isinstance(content, list):
            write(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_rows(path, **options))

    def error(content, name='rows.jsonl', **options):
        with pytest.raises(UserError) as found:
            read(content, name, **options)
        text = str(found.value).replace(f'{tmp_path}/', '')
        assert '\n' not in text and len(text) < 500
        return text
    read.error = error
    return read


def write_rows(folder, rows):
    write(folder / 'some.jsonl', rows)
    return folder / 'some.jsonl'


def texts(row):
    return [row.get(name) for name in ('instruction', 'input', 'output')]


# --- conventions

# what a row of a convention looks like, what it keeps beside instruction, input and output, and the setting `fields`
CONVENTIONS = {
    'alpaca': (lambda row: row, {}),
    'dolly': (lambda row: {'instruction': row['instruction'], 'context': row['input'], 'response': row['output'], 'category': 'qa'}, {'category': 'qa'}),
    'context for input': (lambda row: {'instruction': row['instruction'], 'context': row['input'], 'output': row['output']}, {}),
    'prompt and completion': (lambda row: {'prompt': row['instruction'], 'input': row['input'], 'completion': row['output']}, {}),
    'question and answer': (lambda row: {'answer': row['output'], 'question': row['instruction'], 'context': row['input'], 'id': 7}, {'id': 7}),
    'query and response': (lambda row: {'query': row['instruction'], 'context': row['input'], 'response': row['output']}, {}),
    'messages': (lambda row: {'messages': [
        {'role': 'system', 'content': row['input']}, {'role': 'user', 'content': row['instruction']},
        {'role': 'assistant', 'content': row['output']}, {'role': 'user', 'content': 'And?'}, {'role': 'assistant', 'content': 'No.'}]},
        {'messages_left_out': 2}),
    'conversations': (lambda row: {'id': 'a', 'conversations': [
        {'from': 'system', 'value': row['input']}, {'from': 'gpt', 'value': 'Hello.'},
        {'from': 'human', 'value': row['instruction']}, {'from': 'gpt', 'value': row['output']}]},
        {'id': 'a', 'messages_left_out': 1}),
    'conversation': (lambda row: {'conversation': [
        {'role': 'developer', 'content': row['input']}, {'role': 'user', 'content': row['instruction']},
        {'role': 'assistant', 'content': row['output']}], 'turn': 1}, {'turn': 1, 'messages_left_out': 0}),
    'names of ShareGPT': (lambda row: {'system': row['input'], 'conversations': [
        {'from': 'user', 'value': row['instruction']}, {'from': 'chatgpt', 'value': row['output']}]}, {'messages_left_out': 0}),
    'a chat in two parts': (lambda row: {
        'prompt': [{'role': 'system', 'content': row['input']}, {'role': 'user', 'content': row['instruction']}],
        'completion': [{'role': 'assistant', 'content': row['output']}]}, {'messages_left_out': 0}),
    'messages in parts': (lambda row: {'messages': [
        {'role': 'system', 'content': [{'type': 'text', 'text': row['input']}]},
        {'role': 'user', 'content': [{'type': 'text', 'text': row['instruction'][:3]}, {'type': 'text', 'text': row['instruction'][3:]}]},
        {'role': 'assistant', 'content': [{'type': 'text', 'text': row['output']}]}]}, {'messages_left_out': 0}),
    'texts in turns': (lambda row: {'system': row['input'], 'conversations': [row['instruction'], row['output'], 'And?']}, {'messages_left_out': 1}),
    'names of OASST': (lambda row: {'system_prompt': row['input'], 'messages': [
        {'role': 'prompter', 'text': row['instruction']}, {'role': 'assistant', 'text': row['output']}]}, {'messages_left_out': 0}),
    'two names of a message, one null': (lambda row: {'system': row['input'], 'conversation': [
        {'role': None, 'content': None, 'from': 'Human', 'value': row['instruction']},
        {'role': 'assistant', 'content': row['output'], 'from': None, 'value': None}]}, {'messages_left_out': 0}),
    'messages in columns': (lambda row: {'messages': {
        'role': ['system', 'user', 'assistant'], 'content': [row['input'], row['instruction'], row['output']]}}, {'messages_left_out': 0}),
    'a system column': (lambda row: {'system': row['input'], 'instruction': row['instruction'], 'input': '', 'output': row['output']}, {}),
    'null elsewhere': (lambda row: row | {'prompt': None, 'completion': None, 'messages': None, 'score': float('nan')}, {}),
    'null before': (lambda row: {'instruction': None, 'output': None, 'prompt': row['instruction'], 'input': row['input'], 'completion': row['output']}, {}),
    'names that the user gives': (lambda row: {'q': row['instruction'], 'c': row['input'], 'a': row['output'], 'output': 'no', 'prompt': 'no'}, {'prompt': 'no'}),
}
FIELDS = 'instruction:q, input:c,output:a'


@pytest.mark.parametrize('name', CONVENTIONS)
def test_a_convention_is_read(read, name):
    in_convention, kept = CONVENTIONS[name]
    found, = read([in_convention(ROW)], fields=FIELDS if 'user gives' in name else '')
    assert texts(found) == list(ROW.values())
    beside = {key: value for key, value in found.items() if key not in ROW}
    assert beside == kept


def test_each_row_has_a_convention_of_its_own(read):
    forms = [in_convention for in_convention, _ in CONVENTIONS.values()]
    rows = read([forms[i % len(forms)](row) for i, row in enumerate(PLAIN)], fields=FIELDS)
    assert [texts(row) for row in rows] == [list(row.values()) for row in PLAIN]


def test_rows_of_several_conventions_in_one_parquet_have_nulls(read):
    forms = [CONVENTIONS[name][0] for name in ('alpaca', 'messages', 'conversations', 'prompt and completion')]
    rows = [forms[i % len(forms)](row) for i, row in enumerate(PLAIN)]
    found = read(rows, 'rows.parquet')
    assert [texts(row) for row in found] == [list(row.values()) for row in PLAIN]


def test_a_row_without_an_output_is_asked_the_same():
    """As label.py takes them: what a row is asked does not depend on its output being there."""
    talk = [{'role': 'system', 'content': 'a thing'}, USER]
    for value in (
        {'instruction': 'Name it.', 'input': 'a thing'},
        {'instruction': 'Name it.', 'context': 'a thing'},
        {'question': 'Name it.', 'context': 'a thing'},
        {'messages': talk},
        {'messages': [*talk, CALL, TOOL]},
    ):
        assert texts(to_row(value, {}, needs_output=False)) == ['Name it.', 'a thing', None]
    assert to_row({'messages': [*talk, ASSISTANT]}, {}, needs_output=False)['output'] == 'It.'


# --- what a row is made of


@pytest.mark.parametrize('value, instruction, input, output, left_out', [
    # two messages of the user before the answer are one question
    ([USER, {'role': 'user', 'content': 'Now.'}, ASSISTANT], 'Name it.\n\nNow.', '', 'It.', 0),
    # system and developer, before the question, are the context
    ([{'role': 'system', 'content': 'One.'}, {'role': 'developer', 'content': 'Two.'}, USER, ASSISTANT], 'Name it.', 'One.\n\nTwo.', 'It.', 0),
    # an assistant that speaks first answers nothing
    ([ASSISTANT, USER, {'role': 'assistant', 'content': 'That.'}], 'Name it.', '', 'That.', 1),
    # what follows the first answer is left out
    ([USER, ASSISTANT, USER, ASSISTANT, USER], 'Name it.', '', 'It.', 3),
    ([USER, ASSISTANT | {'weight': 1}, USER, ASSISTANT | {'weight': 0}], 'Name it.', '', 'It.', 2),
    # a system's text may follow the question; thoughts are no answer; LangChain's name of the role
    ([USER, {'role': 'system', 'content': 'Be short.'}, ASSISTANT], 'Name it.', 'Be short.', 'It.', 0),
    ([USER, ASSISTANT | {'channel': 'analysis', 'content': 'Let me see.'}, ASSISTANT | {'channel': 'final'}], 'Name it.', '', 'It.', 1),
    ([{'role': 'human', 'content': 'Name it.'}, {'role': 'ai', 'content': 'It.'}], 'Name it.', '', 'It.', 0),
])
def test_a_chat_gives_its_first_exchange(value, instruction, input, output, left_out):
    row = to_row({'messages': value}, {})
    assert texts(row) == [instruction, input, output]
    assert row['messages_left_out'] == left_out


@pytest.mark.parametrize('chat, fault', [
    ([USER, CALL, TOOL, ASSISTANT], 'the first question of its chat is not answered, but followed by a tool call: assistant'),
    ([USER, {'role': 'assistant', 'tool_calls': CALL['tool_calls']}], 'followed by a tool call: assistant'),
    ([USER, {'role': 'assistant', 'content': 'Wait.', 'function_call': {'name': 'f'}}], 'followed by a tool call'),
    ([{'from': 'human', 'value': 'Area?'}, {'from': 'function_call', 'value': '{"name": "area"}'}, {'from': 'observation', 'value': '15'},
      {'from': 'gpt', 'value': 'It is 15.'}], 'followed by a tool call: function_call'),
    ([USER, ASSISTANT | {'weight': 0}, USER, ASSISTANT], 'the first answer of its chat has weight 0'),
    ([USER, ASSISTANT | {'weight': '0'}], 'the first answer of its chat has weight 0'),
    ([USER, ASSISTANT | {'train': False}], 'the first answer of its chat has weight 0'),
    ([USER, ASSISTANT | {'loss': False}], 'the first answer of its chat has weight 0'),
    ([USER | {'images': ['aGk=']}, ASSISTANT], 'a message of its chat holds images'),
    ([USER, {'role': 'assistant', 'content': None}], 'the first answer of its chat is empty'),
    ([USER, {'role': 'assistant', 'content': ' \n'}], 'the first answer of its chat is empty'),
    ([USER], 'the first question of its chat is not answered'),
    ([], 'its chat has no message of the user'),
    ([{'from': 'gpt', 'value': 'Hi.'}], 'its chat has no message of the user'),
    (['Name it.', USER], "its chat is not a list of messages: ['Name it.', {'role'"),
    ('Name it.', "its chat is not a list of messages: 'Name it.'"),
    ({'role': 'user'}, "its chat is not a list of messages: {'role': 'user'}"),
    ([{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}, ASSISTANT], "a message of its chat is not a text: {'type': 'image_url'"),
    ([{'role': 'user', 'content': 7}, ASSISTANT], 'a message of its chat is not a text: 7'),
])
def test_a_chat_whose_first_question_has_no_answer_is_no_row(chat, fault):
    with pytest.raises(Fault) as found:
        to_row({'messages': chat}, {})
    assert fault in str(found.value)


def test_the_system_text_of_a_chat_and_of_its_column_come_before_the_input():
    row = to_row({'system': 'Be short.', 'messages': [{'role': 'system', 'content': 'In English.'}, USER, ASSISTANT]}, {})
    assert row['input'] == 'Be short.\n\nIn English.'
    row = to_row({'system': 'Be short.', 'instruction': 'Name it.', 'input': 'a thing', 'output': 'It.'}, {})
    assert row['input'] == 'Be short.\n\na thing'


def test_a_system_prompt_in_a_column_of_that_name_comes_before_the_input():
    row = to_row({'id': '1', 'system_prompt': 'Be short.', 'question': 'Name it.', 'response': 'It.'}, {})
    assert texts(row) == ['Name it.', 'Be short.', 'It.']


def test_what_of_a_row_is_left_out_is_counted():
    row = to_row({'instruction': 'And the second?', 'input': '', 'output': 'Blue.', 'history': [['Name the first.', 'Red.']]}, {})
    assert row['messages_left_out'] == 2
    for name in 'reasoning_content', 'reasoning', 'thinking':
        assert to_row({'messages': [USER, ASSISTANT | {name: 'Let me see.'}]}, {})['reasoning_left_out'] == 1


@pytest.mark.parametrize('row', [
    {'prompt': 'Name it.', 'completion': 'Bad.', 'label': False},
    {'prompt': 'Name it.', 'completion': 'Bad.', 'label': 'False'},
    {'prompt': 'Name it.', 'response': 'Bad.', 'label': 0},
    {'messages': [USER, ASSISTANT], 'label': 'false'},
    {'instruction': 'Name it.', 'output': 'Bad.', 'kto_tag': False},
    {'prompt': [USER], 'completion': [ASSISTANT], 'label': False},
])
def test_an_answer_that_people_marked_as_bad_is_not_learned(row):
    """TRL's unpaired preferences."""
    with pytest.raises(Fault, match='label is false'):
        to_row(row, {})
    assert to_row(row | {'label': True, 'kto_tag': True}, {})['output']


@pytest.mark.parametrize('given', [
    {'instruction': '', 'output': '', 'question': 'Name it.', 'context': 'a thing', 'response': '', 'answer': 'It.'},
    {'instruction': 'Name it.', 'input': '', 'output': '', 'context': 'a thing', 'response': 'It.'},
])
def test_an_empty_cell_of_a_joined_table_gives_way_to_a_full_one(given):
    row = to_row(given | {'prompt': ''}, {})
    assert texts(row) == ['Name it.', 'a thing', 'It.']
    # an answer that is empty under every name stays an empty answer
    assert texts(to_row({'instruction': 'Say nothing.', 'output': '', 'response': ''}, {})) == ['Say nothing.', None, '']


def test_fields_may_exchange_our_names(read):
    row = {'instruction': 'Translate.', 'input': 'hello', 'output': 'bonjour'}
    assert texts(read([row], fields='instruction:output,output:instruction')[0]) == ['bonjour', 'hello', 'Translate.']
    assert texts(read([row], fields='instruction:instruction,input:output,output:input')[0]) == ['Translate.', 'bonjour', 'hello']


def test_a_column_of_objects_does_not_hide_the_fields_that_a_user_names(read):
    rows = [{'q': 'Name it.', 'a': 'It.', 'docs': [{'t': 1}]}]
    assert texts(read(rows, 'rows.json', fields='instruction:q,output:a')[0]) == ['Name it.', None, 'It.']


def test_a_table_of_one_column_holds_rows_without_an_output(read):
    assert texts(read('instruction\nName a tree.\nName a bird.\n', 'rows.csv', needs_output=False)[1]) == ['Name a bird.', None, None]


def test_a_table_with_two_columns_of_one_name_is_refused(read):
    assert 'two of its columns have the same name' in read.error('instruction,output,output\na,b,c\n', 'rows.csv')
    assert texts(read('instruction,output,,\na,b,,\n', 'rows.csv')[0]) == ['a', None, 'b']


@pytest.mark.parametrize('encoding, words', [('utf-16', 'it is text in UTF-16: save it as JSON'), ('latin-1', 'save it in UTF-8')])
def test_texts_in_other_encodings_are_told(read, encoding, words):
    assert words in read.error('instruction,output\nGrüße,Hallo\n'.encode(encoding), 'rows.csv')


@pytest.mark.parametrize('value', [None, float('nan')])
def test_null_and_nan_are_missing(value):
    assert texts(to_row({'instruction': 'Name it.', 'input': value, 'output': 'It.'}, {})) == ['Name it.', None, 'It.']
    with pytest.raises(Fault, match='output is missing'):
        to_row({'instruction': 'Name it.', 'output': value}, {})


def test_the_fields_that_a_user_names_are_never_overruled(read):
    rows = [{'instruction': 'Name it.', 'input': '', 'output': 'OLD', 'corrected_output': 'NEW'}]
    assert read(rows, fields='instruction:instruction,output:corrected_output')[0]['output'] == 'NEW'
    # nor is another field taken where the name has a slip
    said = read.error(rows, fields='instruction:instruction,output:corrected_ouput')
    assert 'row 0: corrected_ouput is missing: say which of instruction, input, output, corrected_output it is' in said
    # the number of a row, which tables have under no name, is not its input
    assert read([{'': '0', 'q': 'Name it.', 'a': 'It.'}], fields='instruction:q,output:a')[0].get('input') is None


@pytest.mark.parametrize('fields', ['instruction:q', 'nonsense', 'instruction:q,output:', 'instruction:q,output:a,answer:b'])
def test_the_setting_fields_names_instruction_and_output(read, fields):
    assert 'must be like instruction:q,output:a' in read.error([ROW], fields=fields)


# --- files


@pytest.mark.parametrize('ending', ['json', 'jsonl', 'json.gz', 'jsonl.gz', 'parquet'])
def test_a_file_is_known_by_its_content_and_not_by_its_name(read, tmp_path, ending):
    write(tmp_path / f'rows.{ending}', PLAIN)
    content = (tmp_path / f'rows.{ending}').read_bytes()
    assert [texts(row) for row in read(content, 'rows.txt')] == [list(row.values()) for row in PLAIN]


@pytest.mark.parametrize('delimiter', [',', ';', '\t'])
@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
def test_a_table_of_text(read, delimiter, line_end):
    lines = ['instruction', 'input', 'output'], ['Name it.', '', '"It, or; that"'], ['"Say\n""no""\nnow"', 'x', 'No.']
    rows = read('\ufeff' + line_end.join(map(delimiter.join, lines)) + line_end, 'rows.csv')
    assert [texts(row) for row in rows] == [['Name it.', '', 'It, or; that'], ['Say\n"no"\nnow', 'x', 'No.']]


def test_white_space_before_a_cell_is_not_of_it(read):
    """Or its quotation marks would be, too."""
    rows = read('instruction, input, output\n"Name it.", , "It, or; that"\n')
    assert [texts(row) for row in rows] == [['Name it.', '', 'It, or; that']]


def test_a_quotation_mark_that_is_not_closed_is_told(read):
    """It would make one cell of the rest of the file."""
    assert 'a quotation mark in it is not closed' in read.error('instruction,output\nA,"B\nC,D\n')
    assert 'or not doubled within a cell' in read.error('instruction,output\nA,"say "B" now"\n')


def test_a_cell_of_a_table_may_be_long(read):
    assert read(f'instruction,output\n{"a" * 200_000},b\n')[0]['instruction'] == 'a' * 200_000


def test_a_row_of_a_table_with_too_many_cells_is_faulty(read):
    """A comma that is not between quotation marks would cut its answer."""
    assert 'row 0' in read.error('instruction,output\nGreet me.,Hello, friend\n')
    assert 'row 0: output is missing' in read.error('instruction,output\nGreet me.\n')


@pytest.mark.parametrize('text', [
    json.dumps(ROW, indent=2) + '\n' + json.dumps(ROW, indent=2),  # objects over several lines
    json.dumps({'data': [ROW, ROW]}),  # a list in an object
    json.dumps({'version': '1.0', 'rows': [ROW, ROW]}),
    json.dumps({name: [text, text] for name, text in ROW.items()}),  # columns
    '\n\n' + json.dumps(ROW) + '\n \n' + json.dumps(ROW),
    f'[{json.dumps(ROW)}, {json.dumps(ROW)},]',
])
def test_forms_of_json(read, text):
    assert [texts(row) for row in read(text)] == [list(ROW.values())] * 2


def test_several_inputs_and_outputs_to_one_instruction(read):
    """Self-instruct's form."""
    instances = [{'input': 'a thing', 'output': 'It.'}, {'input': '', 'output': 'That.'}]
    rows = read([{'instruction': 'Name it.', 'instances': instances, 'is_classification': False}])
    assert [texts(row) for row in rows] == [['Name it.', 'a thing', 'It.'], ['Name it.', '', 'That.']]
    # a table beside a row's own output is no rows
    assert len(read([ROW | {'links': [{'output': 1}, {'output': 2}]}])) == 1


@pytest.mark.parametrize('name', ['completion', 'answer', 'output', 'response'])
def test_a_list_of_messages_as_prompt_and_a_text_as_answer(read, name):
    row, = read([{'prompt': [USER], name: 'It.'}])
    assert (row['instruction'], row['output']) == (USER['content'], 'It.')
    assert 'its chat is not a list of messages: 7' in read.error([{'prompt': [USER], name: 7}])
    assert 'is not answered' in read.error([{'prompt': [USER]}])


@pytest.mark.parametrize('row, right', [
    # a list within a row is no list of rows where the row has an answer
    ({'instruction': 'Weather?', 'response': 'Sunny.', 'calls': [{'input': 'Rome', 'output': '{}'}]}, ('Weather?', None, 'Sunny.')),
    ({'question': 'Why?', 'answer': 'So.', 'steps': [{'input': 'a', 'output': 'b'}, {'input': 'c', 'output': 'd'}]}, ('Why?', None, 'So.')),
    # a text that stands once beside several questions belongs to each
    ({'context': 'A text.', 'qas': [{'question': 'Why?', 'answer': 'So.'}]}, ('Why?', 'A text.', 'So.')),
    ({'passage': 'A text.', 'question': 'Why?', 'answer': 'So.'}, ('Why?', 'A text.', 'So.')),
    ({'instruction': 'Say it.', 'output': 'It.', 'label': 0, 'images': []}, ('Say it.', None, 'It.')),
    ({'instruction': 'Say it.', 'output': 'It.', 'messages_left_out': 'a field of the file'}, ('Say it.', None, 'It.')),
    ({'instruction': 'Say it.', 'output': 'It.', 'system_message': 'Be brief.'}, ('Say it.', 'Be brief.', 'It.')),
])
def test_what_stands_beside_an_answer(read, row, right):
    found, = read([row])
    assert tuple(texts(found)) == right and found.get('messages_left_out') is None


@pytest.mark.parametrize('row, said', [
    ({'question': 'Which?', 'options': ['a', 'b'], 'answer': 'A'}, 'it is a question with choices'),
    ({'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}, 'it has two answers to choose from'),
    ({'prompt': [USER], 'chosen': [ASSISTANT], 'rejected': [ASSISTANT]}, 'it has two answers to choose from'),
    ({'image': 'cat.jpg', 'instruction': 'What is it?', 'output': 'A cat.'}, 'it is about an image'),
    ({'prompt': [USER, ASSISTANT, USER], 'completion': [ASSISTANT]}, 'its prompt is a chat of several turns'),
    ({'instruction': 'a', 'output': 'x' + ' ' * 100_000 + 'y'}, 'output has 100,000 characters of white space'),
])
def test_an_answer_that_cannot_be_learned_alone_is_told(read, row, said):
    assert said in read.error([row])


def test_fields_of_no_use_are_named(run, tmp_path):
    rows = [row | {'context': 'kept', 'id': i, 'history': [], '': ''} for i, row in enumerate(PLAIN)]
    write(tmp_path / 'rows.json', rows)
    shown = run('prepare.py', '--source=rows.json', '--dataset=x').stdout
    assert 'fields that are of no use here: context, id\n' in shown
    # where fields are named, the input is found as without
    row, = list(read_rows(write_rows(tmp_path, [{'q': 'a', 'a': 'b', 'context': 'c'}]), ' instruction: q, output: a'))
    assert texts(row) == ['a', 'c', 'b']


def test_an_empty_chat_gives_way_to_an_instruction(read):
    """As other empty cells do, where tables of several data sets were joined."""
    for name in 'messages', 'conversations':
        row, = read([ROW | {'output': 'It.', name: []}])
        assert (row['instruction'], row['output']) == (ROW['instruction'], 'It.')
        assert 'its chat has no message of the user' in read.error([{name: []}])
    # of two chats the one that holds something
    row, = read([{'messages': [], 'conversations': [USER, {'role': 'assistant', 'content': 'It.'}]}])
    assert row['output'] == 'It.'


def test_the_names_of_many_files_are_no_name_of_one(run, tmp_path):
    """Such a text is longer than any file's name may be; nor has a folder a name to look for a script by."""
    names = [f'part-{i:05}-of-00030.jsonl' for i in range(30)]
    for i, name in enumerate(names):
        (tmp_path / name).write_text(json.dumps({'instruction': f'Say {i}.', 'output': str(i)}))
    run('prepare.py', '--source=' + ','.join(names), '--dataset=d')
    assert len(json.loads((tmp_path / 'data/d/train.json').read_text())['sources']) == 30
    for name in '.', '/':
        assert f'cannot read {name}: [Errno 21]' in run('prepare.py', f'--source={name}', '--dataset=e', code=2).stderr


def test_a_column_called_like_a_zip_file(read):
    assert read('PK,instruction,output\n1,Say it.,It.\n', 'rows.csv') == [{'PK': '1', 'instruction': 'Say it.', 'output': 'It.'}]


def test_json_lines_end_at_line_feeds_alone(read):
    """Not at the other characters at which Python ends a line; and a byte order mark is not text."""
    rows = [row | {'output': row['output'] + '\u2028\x85x'} for row in PLAIN]
    as_lines = '\ufeff' + '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
    as_list = '\ufeff' + json.dumps(rows, ensure_ascii=False)
    assert read(as_lines) == read(as_list, 'rows.json') == rows


def test_a_parquet_of_columns_that_cannot_be_told_apart_or_read(read, tmp_path):
    columns = [pyarrow.array(['Say it.']), pyarrow.array(['It.']), pyarrow.array(['That.'])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ['instruction', 'output', 'output']), tmp_path / 'a.parquet')
    assert 'two of its columns have the same name' in read.error((tmp_path / 'a.parquet').read_bytes(), 'a.parquet')
    # bytes that are no text are no answer, and Python's way to write them is none either
    parquet.write_table(pyarrow.table({'instruction': ['Say it.'], 'output': [b'\xff\xfe a']}), tmp_path / 'b.parquet')
    assert 'row 0: output is missing' in read.error((tmp_path / 'b.parquet').read_bytes(), 'b.parquet')


def test_texts_that_a_parquet_holds_as_bytes(read, tmp_path):
    table = pyarrow.table({name: pyarrow.array([text.encode()], pyarrow.binary()) for name, text in (ROW | {'output': 'für dich'}).items()})
    parquet.write_table(table, tmp_path / 'a.parquet')
    assert texts(read((tmp_path / 'a.parquet').read_bytes())[0])[2] == 'für dich'


def test_columns_of_a_parquet_that_python_cannot_hold_do_not_matter(read, tmp_path):
    nanoseconds = pyarrow.array([1_000_000_001] * len(PLAIN), pyarrow.timestamp('ns'))
    table = pyarrow.Table.from_pylist(PLAIN).append_column('time', nanoseconds)
    parquet.write_table(table, tmp_path / 'a.parquet')
    rows = read((tmp_path / 'a.parquet').read_bytes(), 'messages.pq')
    assert [texts(row) for row in rows] == [list(row.values()) for row in PLAIN]


@pytest.mark.parametrize('values, kind', [
    ([2**62], pyarrow.timestamp('us')), ([[1]], pyarrow.list_(pyarrow.timestamp('ns'))), ([{'t': 1}], pyarrow.struct([('t', pyarrow.timestamp('ns'))]))])
def test_further_columns_that_python_cannot_hold_do_not_matter(read, tmp_path, values, kind):
    table = pyarrow.Table.from_pylist([ROW]).append_column('time', pyarrow.array(values, kind))
    parquet.write_table(table, tmp_path / 'a.parquet')
    assert texts(read((tmp_path / 'a.parquet').read_bytes())[0]) == list(ROW.values())


def test_a_column_that_datasets_wrote_as_json_is_text(read, tmp_path):
    """The package datasets writes a column of mixed types as texts of JSON, with quotation marks around a text."""
    json_type = getattr(pyarrow, 'json_', None)
    if not json_type:
        pytest.skip('this pyarrow has no such type')
    outputs = pyarrow.ExtensionArray.from_storage(json_type(pyarrow.string()), pyarrow.array(['"cold"', '"a \\"b\\""']))
    table = pyarrow.table({'instruction': ['Hot?', 'Quote.'], 'output': outputs})
    parquet.write_table(table, tmp_path / 'a.parquet')
    assert [row['output'] for row in read((tmp_path / 'a.parquet').read_bytes())] == ['cold', 'a "b"']


@pytest.mark.parametrize('nested', [False, True])
def test_texts_of_json_in_lists_and_objects_of_a_parquet_are_read(read, tmp_path, nested):
    """Messages whose contents have mixed types are such texts, too."""
    json_type = getattr(pyarrow, 'json_', None)
    if not json_type:
        pytest.skip('this pyarrow has no such type')
    chats = [[USER, ASSISTANT], [{'role': 'user', 'content': [{'type': 'text', 'text': 'Why?'}]}, {'role': 'assistant', 'content': None}]]
    if nested:
        cells = pyarrow.array([message['content'] and json.dumps(message['content']) for chat in chats for message in chat])
        contents = pyarrow.ExtensionArray.from_storage(json_type(pyarrow.string()), cells)
        messages = pyarrow.StructArray.from_arrays([pyarrow.array(['user', 'assistant'] * 2), contents], ['role', 'content'])
        column = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2, 4], pyarrow.int32()), messages)
    else:
        column = pyarrow.ExtensionArray.from_storage(json_type(pyarrow.string()), pyarrow.array(list(map(json.dumps, chats))))
    parquet.write_table(pyarrow.table({'messages': column}), tmp_path / 'a.parquet')
    rows = read((tmp_path / 'a.parquet').read_bytes(), needs_output=False)
    assert [texts(row) for row in rows] == [['Name it.', '', 'It.'], ['Why?', '', None]]


@pytest.mark.parametrize('content, said', [
    ('', 'it is empty'),
    ('instruction,output\na,b\n'.encode('utf-16-le'), 'it is no text in UTF-8'),
    (b'\xff\xff\xff\xff\x10\0\0\0', 'it is an Arrow file'),
    ('\n \n', 'it is empty'),
    ('[]', 'has no rows'),
    ('[{"data": []}]', 'has no rows'),
    ('text\nabc\n', "it begins with 'text"),
    ('[{"instruction": "a", "output": "b"', 'it is not JSON, or not whole'),
    ('[{"instruction": "a", "output": "b"}, {"instruction": "a", "outp', 'it is not JSON, or not whole'),
    ('[{"instruction": "a", "output": "b"} oops', 'it is not JSON, or not whole'),
    ('[{"instruction": "a", "output": "b"}] [', 'there is text after the end'),
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b"}\n{"a\n', 'line 3'),
    ('{"instruction": "a\tb", "output": "b"}\n', """Invalid control character at, line 1, after '{"instruction": "a'"""),
    ("{'instruction': 'a'}", 'it is not JSON, or not whole'),
    ('<!DOCTYPE html><html>', 'it is a web page'),
    (b'PK\x03\x04', 'it is a zip or Excel file'),
    (b'\x28\xb5\x2f\xfd....', 'compressed by zstd'),
    (b'PAR1' * 9, 'it is not a whole Parquet file'),
    (b'\xff\xfe[\x00', 'cannot read rows.jsonl'),
])
def test_a_file_that_cannot_be_read_is_told(read, content, said):
    assert said in read.error(content)


def test_a_gzip_that_is_cut_is_told(read, tmp_path):
    write(tmp_path / 'whole.json.gz', PLAIN)
    assert 'cannot read cut.json.gz' in read.error((tmp_path / 'whole.json.gz').read_bytes()[:-20], 'cut.json.gz')


class CountingDecoder:
    """JSON's decoder, which counts the characters that it reads."""

    def __init__(self):
        self.n_read = 0

    def raw_decode(self, text, start):
        end = len(text)
        try:
            value, end = DECODER.raw_decode(text, start)
            return value, end
        except json.JSONDecodeError as error:
            end = error.pos if 'Unterminated' not in error.msg else len(text)
            raise
        finally:
            self.n_read += end - start


@pytest.mark.parametrize('form', ['list', 'lines'])
@pytest.mark.parametrize('n_rows, row_size', [(800, 10_000), (4, 2_000_000)])
def test_a_file_is_decoded_in_linear_time(read, monkeypatch, form, n_rows, row_size):
    """8 MB in rows smaller and larger than the blocks in which it comes: a row that a block cuts is decoded again, but not with every block."""
    decoder = CountingDecoder()
    monkeypatch.setattr(prepare, 'DECODER', decoder)
    rows = [{'instruction': 'x' * row_size, 'output': 'x'}] * n_rows
    text = json.dumps(rows) if form == 'list' else '\n'.join(map(json.dumps, rows))
    assert len(read(text)) == n_rows
    assert len(text) - 2 * n_rows <= decoder.n_read < 3 * len(text)


@pytest.mark.parametrize('form', ['list', 'lines'])
@pytest.mark.parametrize('fault', ['{"instruction": "a\tb", "output": "c"}', '{"instruction": "a" "output": "c"}', '{"instruction": a}', '}'])
def test_a_bad_file_is_read_as_far_as_its_fault(form, fault):
    """And not to its end, to see whether that mends it."""
    lines = [json.dumps({'instruction': 'word ' * 2000, 'output': 'x'})] * 2000
    lines[1] = fault
    file = io.StringIO(f'[{", ".join(lines)}]' if form == 'list' else '\n'.join(lines))
    with pytest.raises(Fault, match='it is not JSON, or not whole'):
        list(prepare.read_json_text(file))
    assert file.tell() <= 2 << 20


# --- faulty rows


@pytest.mark.parametrize('row, said', [
    (1, 'row 0: it is int, not an object: 1'),
    ({'q': 'a', 'a': 'b'}, 'row 0: instruction is missing: say which of q, a it is, --fields=instruction:...,output:...'),
    ({'question': 'a', 'reply': 'b'}, 'row 0: output is missing: say which of question, reply it is'),
    ({'instruction': 'a'}, 'row 0: output is missing'),
    ({'instruction': 'a', 'output': None}, 'row 0: output is missing'),
    ({'instruction': 'a', 'output': 3}, 'row 0: output is not a text: 3'),
    ({'question': '0 + 1 = ?', 'answer': 1}, 'row 0: answer is not a text: 1'),
    ({'instruction': 'a', 'output': 'b', 'input': 0}, 'row 0: input is not a text: 0'),
    ({'instruction': ' ', 'output': 'b'}, 'row 0: instruction is empty'),
    ({'messages': [USER]}, 'row 0: the first question of its chat is not answered'),
    ({'instruction': ['x' * 500], 'output': 'b'}, "row 0: instruction is not a text: ['xxx"),  # of which 80 characters are shown
])
def test_a_faulty_row_is_told_with_what_was_seen(read, row, said):
    assert f'rows.json: {said}' in read.error([row], 'rows.json')


def test_faulty_rows_are_told_by_their_first_of_each_kind(read):
    said = read.error([{'output': 'x'}] * 50 + [ROW, {'instruction': 'a', 'output': 3}, {'instruction': 'a', 'output': 4}])
    assert 'row 0: instruction is missing: say which of output it is, --fields=instruction:...,output:..., or with input:... (and 49 more rows)' in said
    assert 'row 51: output is not a text: 3 (and 1 more rows)' in said
    assert said.endswith('--skip_faulty=True leaves such rows out')


def test_faulty_rows_can_be_left_out_and_are_counted_by_reason(read):
    from collections import Counter
    faulty = [{'conversations': []}, {'messages': [USER, CALL]}, {'messages': [USER, CALL]}, {'instruction': 'a', 'output': 3}]
    left_out = Counter()
    rows = read([ROW, *faulty, ROW], skip_faulty=True, left_out=left_out)
    assert rows == [ROW, ROW]
    assert left_out == {
        'rows: its chat has no message of the user': 1,
        'rows: the first question of its chat is not answered, but followed by a tool call': 2,
        'rows: output is not a text': 1}


# --- prompts that are compared


def test_prompts_that_differ_in_operators_or_marks_of_letters_are_different():
    operators = '+ - * / % == != < > <= >= && || ! ? . , : ; ( ) [ ] " \''.split()
    assert len({normalize(f'Name this operator. {operator}') for operator in operators}) == len(operators)
    assert normalize('कि') != normalize('की')  # combining marks
    assert normalize('x = 5!') != normalize('x = 5 !')


def test_prompts_that_differ_in_form_alone_are_equal():
    # as macOS, Word and Chinese keyboards write them
    for text, other in (('Café?', 'cafe\u0301'), ('第1个城市在哪里？', '第1个城市在哪里'), ('What’s “AI 1”?', 'What\'s "AI 1"?'), ('«Да»…', 'да'), ('a\u200bb', 'ab')):
        assert normalize(text) == normalize(other) and text != other
    assert len({normalize(text) for text in ('Write the number 7.', 'write  the number 7', 'Write, the NUMBER 7!\n', '"Write" the (number) 7')}) == 1


# --- through the command


def test_conventions_and_formats_give_the_same_ids(run, tmp_path):
    """Five files in five formats, whose rows have a convention each, are the plain file."""
    write(tmp_path / 'plain.json', PLAIN)
    forms = [in_convention for in_convention, _ in CONVENTIONS.values()]
    mixed = [forms[i % len(forms)](row) for i, row in enumerate(PLAIN)]
    for i, ending in enumerate(('json', 'jsonl', 'json.gz', 'jsonl.gz')):
        write(tmp_path / f'{i}.{ending}', mixed[10 * i:10 * i + 10])
    write(tmp_path / '4.parquet', PLAIN[40:50])
    (tmp_path / '5.csv').write_text('question,context,answer\n' + '\n'.join(','.join(row.values()) for row in PLAIN[50:]))
    run('prepare.py', '--source=plain.json', '--dataset=plain')
    run('prepare.py', '--source=0.json,1.jsonl,2.json.gz,3.jsonl.gz,4.parquet,5.csv', '--dataset=mixed', f'--fields={FIELDS}')
    plain = splits_of(tmp_path, 'plain')
    mixed = splits_of(tmp_path, 'mixed')
    for split in SPLITS:
        assert plain[split][0] == mixed[split][0]
        assert plain[split][1]['answer'] == mixed[split][1]['answer']


def test_what_is_left_out_is_counted_and_shown(run, tmp_path):
    chat = [{'role': 'user', 'content': 'Name it.'}, ASSISTANT]
    rows = PLAIN + PLAIN[:3] + [
        {'messages': [USER, CALL, TOOL, ASSISTANT]},
        {'messages': [USER, ASSISTANT | {'weight': 0}]},
        {'conversations': []},
        {'conversations': []},
        {'messages': [*chat, USER, ASSISTANT]},
        {'messages': [{'role': 'user', 'content': 'Why?'}, ASSISTANT | {'reasoning_content': 'Let me see.'}]},
        {'prompt': 'Spell it.', 'completion': ' It.<|endoftext|>'},
    ]
    write(tmp_path / 'rows.json', rows)
    assert '--skip_faulty=True' in run('prepare.py', '--source=rows.json', '--dataset=x', code=2).stderr
    shown = run('prepare.py', '--source=rows.json', '--dataset=x', '--skip_faulty=True').stdout
    for line in (
        'left out: 1 rows: the first question of its chat is not answered, but followed by a tool call',
        'left out: 1 rows: the first answer of its chat has weight 0',
        'left out: 2 rows: its chat has no message of the user',
        'left out: 2 messages: a row is the first exchange of a chat',
        'left out: 1 texts of reasoning',
        'left out: 3 rows: they equal others',
        '1 answers spell <|endoftext|>: that stays text, and the end is added to each',
    ):
        assert line in shown.splitlines()
    assert sum(figures(shown, 'rows')) == 63


@pytest.mark.parametrize('text', ['[' * 100_000, '{"instruction": "a", "output": "b", "more": ' + '[' * 100_000 + ']' * 100_000 + '}'])
def test_json_that_nests_too_deep_is_told_in_one_line(read, text):
    with pytest.raises(UserError, match='cannot read .*recursion'):
        read(text)


def test_the_json_of_a_split_is_json_whatever_its_rows_held(run, tmp_path):
    """NaN, numbers that are too large and bytes that are no text become null or are left out, and dates of a Parquet become text."""
    lines = [json.dumps(row | {'score': float('nan'), 'n': [float('inf'), 0.5]}).replace('0.5', '1e999') for row in PLAIN]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(lines))
    run('prepare.py', '--source=rows.jsonl', '--dataset=x')

    def fail(name):
        raise AssertionError(name)
    rows = json.loads((tmp_path / 'data/x/test.json').read_text(), parse_constant=fail)['rows']
    assert rows[0]['n'] == [None, None] and 'score' not in rows[0]
    table = pyarrow.table({name: [row[name] for row in PLAIN] for name in ROW} | {'date': pyarrow.array([1] * 60, pyarrow.date32()), 'raw': [b'\xff'] * 60})
    parquet.write_table(table, tmp_path / 'rows.parquet')
    run('prepare.py', '--source=rows.parquet', '--dataset=y')
    rows = json.loads((tmp_path / 'data/y/test.json').read_text())['rows']
    assert rows[0]['date'] == '1970-01-02' and 'raw' not in rows[0]


def test_a_written_end_of_text_stays_text(run, tmp_path):
    write(tmp_path / 'rows.json', [row | {'output': row['output'] + '<|endoftext|>'} for row in PLAIN])
    shown = run('prepare.py', '--source=rows.json', '--dataset=x').stdout
    assert '60 answers spell <|endoftext|>' in shown
    bin, meta = splits_of(tmp_path, 'x')['val']
    ids = [int.from_bytes(bin[i:i + 2], 'little') for i in range(0, len(bin), 2)]
    assert ids.count(50256) == meta['examples']
    assert get_tokenizer().decode(ids).count('<|endoftext|>') == 2 * meta['examples']


def test_a_rows_own_source_is_kept(run, tmp_path):
    write(tmp_path / 'a.json', [row | {'source': 'news' if i % 2 else ['wiki', 'books']} for i, row in enumerate(PLAIN[:30])])
    write(tmp_path / 'b.json', [row | {'source': 'books'} for row in PLAIN[30:]])
    run('prepare.py', '--source=a.json,b.json', '--dataset=x')
    for split in 'val', 'test':
        for row in splits_of(tmp_path, 'x')[split][1]['rows']:
            assert (row['source'] == 'books') == (row['source_file'] == 'b.json')


def test_prompts_that_are_operators_make_a_data_set(run, tmp_path):
    operators = '+ - * / % == != < > <= >= && || ! ~ ^ & | << >> += -= *= /= -> => :: ?: ++ -- @ # $ = ** // . , : ;'.split()
    rows = [{'instruction': 'Name this operator.', 'input': operator, 'output': f'operator {i}'} for i, operator in enumerate(operators)]
    write(tmp_path / 'rows.json', rows)
    shown = run('prepare.py', '--source=rows.json', '--dataset=x').stdout
    assert sum(figures(shown, 'rows')) == len(operators)
    # where the prompts are equal, that is said to be the cause
    write(tmp_path / 'rows.json', [row | {'input': ''} for row in rows])
    said = run('prepare.py', '--source=rows.json', '--dataset=x', code=2).stderr
    assert f'the {len(rows)} rows have 1 prompts, and rows with one prompt stay together' in said


def test_a_file_is_named_by_its_whole_name_first(run, tmp_path):
    write(tmp_path / 'a, b.json', PLAIN)
    run('prepare.py', '--source=a, b.json', '--dataset=x')
    # a script beside a file that is missing is named if it is called after it, and no other one
    (tmp_path / 'data').mkdir(exist_ok=True)
    (tmp_path / 'data/make_demo.py').write_text('')
    assert 'run: python data/make_demo.py' in run('prepare.py', '--source=data/demo_heldback.json', code=2).stderr
    assert 'make_demo' not in run('prepare.py', '--source=data/emo.json', code=2).stderr
