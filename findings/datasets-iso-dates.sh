#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1 and pandas 3.1.1.
# Seen: a JSON Lines file whose answers all look like ISO dates ("2024-01-01") loads as a column of timestamps.
#   Written back by to_json the answers are integers, milliseconds since 1970. One answer that is no date, or an
#   empty one, and the column is text. "12:30" and "1" stay text; pyarrow.json alone does the same.
# A good guess: JSON has texts and numbers; what stands in quotation marks comes back as text (types are guessed
#   in CSV).
# Why it matters: a data set for "when was ...?" or "rewrite this date", a small shard of one, or the test split
#   of a category. A training target is then 1704067200000, and concatenation with a shard of texts fails.
#   Naming the type, features=Features({'output': Value('string')}), is too late: it gives "2024-01-01
#   00:00:00". Reading the lines with json and Dataset.from_list keeps the text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import json
import os

import datasets

folder = os.environ['FOLDER']
datasets.disable_progress_bars()


def load(name, answers, **settings):
    """Write the answers as JSON Lines, load them, and return the column's type and what to_json makes of it."""
    path = f'{folder}/{name}.jsonl'
    with open(path, 'w') as file:
        for answer in answers:
            file.write(json.dumps({'instruction': 'When?', 'output': answer}) + '\n')
    rows = datasets.load_dataset('json', data_files=path, split='train', cache_dir=f'{folder}/cache', **settings)
    rows.to_json(path + '.back')
    with open(path + '.back') as file:
        back = [json.loads(line)['output'] for line in file]
    print(f'{name}: {answers} -> {rows.features["output"].dtype} -> {back}')
    return rows.features['output'].dtype, back


dates = ['2024-01-01', '1999-12-31']
assert load('dates', dates) == ('timestamp[s]', [1704067200000, 946598400000])
assert load('one_text', [*dates, 'soon']) == ('string', [*dates, 'soon'])
assert load('times', ['12:30', '7:05'])[0] == 'string'
text = datasets.Value('string')
features = datasets.Features({'instruction': text, 'output': text})
assert load('features', dates, features=features) == ('string', ['2024-01-01 00:00:00', '1999-12-31 00:00:00'])
rows = datasets.Dataset.from_list([{'output': date} for date in dates])
print(f'from_list: {rows["output"][:]}')
assert rows['output'][:] == dates
PY
