"""
How the demo's model answers lines as visitors type them, by kind: python tests/bench_demo.py [out/demo ...]

A line of visitors.jsonl is {kind, typed, right}: what was typed, and the answers that are right. An answer to something else than its tasks
is right if it says that the model only knows these. In odd case, the case of the answer does not matter.
"""
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from engine import generate  # noqa: E402
from model import GPT  # noqa: E402
from prepare import detokenize, encode_prompt  # noqa: E402

LINES = [json.loads(line) for line in (ROOT / 'tests/visitors.jsonl').read_text(encoding='utf-8').splitlines()]


def is_right(line, answer):
    if line['right'] == ['ELSE']:
        return answer.startswith('I only know these tasks')
    if line['kind'] == 'odd case':
        return answer.lower() in [right.lower() for right in line['right']]
    return answer in line['right']


def row_of(typed):
    """As sample.py reads a line: instruction | input."""
    instruction, _, its_input = typed.partition('|')
    return {'instruction': instruction.strip(), 'input': its_input.strip()}


def measure(out_dir, show):
    model = GPT.from_pretrained(out_dir)
    answers = generate(model, [encode_prompt(row_of(line['typed'])) for line in LINES], max_new_tokens=60)
    right = Counter()
    for line, ids in zip(LINES, answers):
        answer = detokenize(ids).strip()
        right[line['kind']] += is_right(line, answer)
        if show and not is_right(line, answer):
            print(f'  {line["typed"]}  ->  {answer}')
    return right


def main():
    show = '--wrong' in sys.argv
    folders = [path for path in sys.argv[1:] if path != '--wrong'] or ['out/demo']
    results = [measure(folder, show) for folder in folders]
    number = Counter(line['kind'] for line in LINES)
    print(f'| kind of line | lines | {" | ".join(folders)} |')
    print('|---|---|' + '---|' * len(folders))
    for kind in number:
        print(f'| {kind} | {number[kind]} | ' + ' | '.join(str(right[kind]) for right in results) + ' |')
    shares = [f'{sum(right.values())} ({sum(right.values()) / len(LINES):.0%})' for right in results]
    print(f'| all | {len(LINES)} | ' + ' | '.join(shares) + ' |')


if __name__ == '__main__':
    main()
