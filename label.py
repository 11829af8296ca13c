"""
Label rows that have no output by self-consistency: several answers are sampled to each row, and what most of
them say becomes its output (Wang et al. 2022; as labels to train on, Huang et al. 2022).

    python label.py config/demo.py --label_rows=unlabelled.json

Writes out_dir/pseudo-labels.json, which is a source for prepare.py. Where rows have an output, it shows what
agreement is worth: which share of the labels is right, by how many answers agree.
"""
import itertools
import math
from collections import Counter
from pathlib import Path

from config import UserError, configure
from engine import check_prompt, choose_device, for_inference, join_processes
from prepare import encode_prompt, read_rows
from sample import answer_all, find_run, load_named, load_run, write_answers

from scipy.stats import binomtest

# -----------------------------------------------------------------------------
# model
out_dir = 'out'  # the run: its <model>-sft.pth answers
init_from = 'gpt2-medium'  # what answers where there is no run, or as a flag if it is not the run's base
download_from = 'openai'  # whose files of gpt2* are tried first [openai | huggingface]
cache_dir = ''  # where downloaded weights are kept; empty: gpt2-sft in the user's cache folder
# labels
label_rows = ''  # a file of rows, as prepare.py reads them; where they have an output, it checks the label
fields = ''  # what the file calls its fields, as in prepare.py: 'instruction:q,input:c,output:a'
skip_faulty = False  # leave out faulty rows, counted by reason, instead of refusing the file
self_consistency = 8  # answers sampled to each row [>= 1]
min_agreement = 0.5  # rows with a smaller share of answers for their label are left out [0 .. 1]
# generation
max_new_tokens = 256  # [>= 1]
label_temperature = 0.7  # greedy answers would all agree [> 0]
top_k = 0  # sample among the k likeliest; 0: among all [>= 0]
seed = 123  # of the first answer to each row; the others have the next ones
# device
device = 'auto'  # [auto | cpu | cuda | mps]
dtype = 'auto'  # auto: the GPU's best on cuda, else float32 [auto | float32 | bfloat16 | float16]
# -----------------------------------------------------------------------------
config = configure(globals())


def simplified(text):
    """Answers that differ in case, white space or a full stop at the end are the same."""
    return ' '.join(text.lower().split()).rstrip('.')


def vote(candidates):
    """
    Sampled answers -> (label, agreement). The label is what most answers say, in its most frequent spelling;
    agreement is their share of all. Empty answers and those cut at the limit have no vote. In a tie the
    first answer wins.
    """
    votes = {}
    for candidate in candidates:
        text = candidate['model_response']
        if text and not candidate['truncated']:
            votes.setdefault(simplified(text), []).append(text)
    if not votes:
        return '', 0.0
    winners = max(votes.values(), key=len)
    return Counter(winners).most_common(1)[0][0], len(winners) / len(candidates)


def reliability(rows):
    """Rows with agreement and reference -> for each range of agreement which share of the labels is right."""
    table = []
    for low, high in itertools.pairwise((0, 0.25, 0.5, 0.75, 1, math.inf)):
        inside = [row for row in rows if low <= row['agreement'] < high]
        n_right = sum(simplified(row['output']) == simplified(row['reference']) for row in inside)
        if inside:
            share = binomtest(n_right, len(inside)).proportion_ci(method='wilson')
            right = {'value': n_right / len(inside), 'low': float(share.low), 'high': float(share.high)}
            table.append({'from': low, 'to': min(high, 1), 'rows': len(inside), 'right': right})
    return table


def label(loaded, rows, path, rank, world_size):
    """Give each row what most sampled answers say as its output: <path>.json."""
    for row in rows:
        row.pop('reference', None)  # a field of the file's own, which is no output
        if row.get('output'):
            row['reference'] = row['output']
    settings = {'max_new_tokens': max_new_tokens, 'temperature': label_temperature, 'top_k': top_k,
                'seed': seed, 'dtype': dtype}
    # the answers to a row come one after the other, with seeds of their own
    repeated = [row for row in rows for _ in range(self_consistency)]
    seeds = [seed + n for _ in rows for n in range(self_consistency)]
    results = answer_all(loaded, repeated, path, settings, rank, world_size, seeds)
    if rank > 0:
        return
    for i, row in enumerate(rows):
        candidates = results[i * self_consistency:(i + 1) * self_consistency]
        row['output'], row['agreement'] = vote(candidates)
        row['candidates'] = [candidate['model_response'] for candidate in candidates]
        row['truncated'] = sum(candidate['truncated'] for candidate in candidates)
    labelled = [row for row in rows if row['output'] and row['agreement'] >= min_agreement]
    checked = [row for row in rows if 'reference' in row]
    table = reliability(checked) if checked else []
    n_left_out = len(rows) - len(labelled)
    write_answers(path, labelled, loaded, {}, config, labelled=len(labelled), left_out=n_left_out,
                  reliability=table)
    if table:
        print('\nagreement     rows  right')
    for line in table:
        share = '{value:6.1%} [{low:.1%}, {high:.1%}]'.format(**line['right'])
        print(f'{line["from"]:.2f} to {line["to"]:.2f}{line["rows"]:6}  {share}')
    print(f'{len(labelled)} of {len(rows)} rows got a label, the other {n_left_out} are left out: '
          f'wrote {path}.json')


def main():
    if not label_rows:
        raise UserError('name the rows: --label_rows=unlabelled.json')
    run = find_run(config)
    rows = list(read_rows(label_rows, fields, needs_output=False, skip_faulty=skip_faulty))
    torch_device, compute_dtype = choose_device(device, dtype)
    rank, world_size = join_processes(torch_device)
    loaded = load_run(run) if run else load_named(init_from, cache_dir, download_from)
    for number, row in enumerate(rows):
        check_prompt(loaded.model.config, encode_prompt(row), f'{label_rows}: the prompt of row {number}')
    for_inference(loaded.model, torch_device, compute_dtype)
    if rank == 0:
        print(f'\nloaded {loaded.name}: {loaded.model.config.name} on {torch_device}')
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    label(loaded, rows, out / 'pseudo-labels', rank, world_size)


if __name__ == '__main__':
    main()
