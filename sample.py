"""
Answer the test split with the fine-tuned model and with the one it came from; or one prompt; or talk; or
label rows by the majority of sampled answers (self-consistency, Wang et al. 2022; as labels to train on,
Huang et al. 2022).

    python sample.py config/sft_medium.py
    python sample.py config/sft_medium.py --prompt="Rewrite in passive voice." --input="The cat ate the fish."
    python sample.py config/sft_medium.py --interactive=True
    python sample.py config/sft_medium.py --self_consistency=8 --prompts=unlabelled.json
    torchrun --nproc_per_node=2 sample.py config/sft_medium.py
"""
import hashlib
import itertools
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import UserError, configure, init_device, read_jsonl, read_rows, write_json
from lora import for_inference, init_for_copying, load_adapter
from model import GPT, RELEASED, GPTConfig, ModelError
from prepare import IGNORE, detokenize, encode_prompt, make_batch, read_split

# -----------------------------------------------------------------------------
# model
out_dir = 'out'  # the run: its <model>-sft.pth answers
init_from = 'gpt2-medium'  # where there is no run, or as a flag that names another model: what answers
adapter = ''  # an adapter.safetensors to put on init_from
weights = 'openai'  # whose files of a GPT-2 name come first: 'openai', 'huggingface'
cache_dir = ''  # where they are kept; empty: gpt2-sft in the user's cache folder
# what is answered
dataset = 'instruction-data'  # its test split
before = True  # let the model before fine-tuning answer the test split too
prompt = ''  # one instruction instead
input = ''  # and its input
interactive = False  # talk with the terminal instead
self_consistency = 0  # answers sampled to each row of `prompts`; what most of them say becomes its output
prompts = ''  # a file of rows, as prepare.py reads them; where they have an output, it checks the label
min_agreement = 0.5  # rows with a smaller share of answers for their label are left out
questions = ''  # a JSONL file of questions instead, like data/questions.jsonl; for judge_style=mtbench
# generation
max_new_tokens = 256
temperature = 0.0  # 0: greedy
top_k = 0  # sample among the k likeliest; 0: among all
seed = 123  # of the sampling
# device
device = 'auto'  # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16' (on a CPU of the matrices alone); 'auto': as in train.py
# -----------------------------------------------------------------------------
config = configure(globals())

PREDICTIONS, BEFORE = 'instruction-data-with-response', 'instruction-data-with-response-before'
LABELS = 'pseudo-labels'
out = Path(out_dir)
HEADER_WORDS = '### Response:'  # which some models say again

# --- load: the run's model, or the one that init_from names

def newest(paths):
    return max(paths, key=os.path.getmtime, default=None)

def find_run(out_dir, init_from, is_needed=False):
    """-> the .json of the newest run in out_dir; None if there is none, or a flag names another model than
    the one it came from. is_needed: without a run a flag must name the model. Raises UserError."""
    run, is_flag = newest(Path(out_dir).glob('*-sft.json')), f'--init_from={init_from}' in sys.argv
    if not run and (init_from in ('scratch', 'resume') or is_needed and not is_flag):
        raise UserError(f'{out_dir} has no run: train one, or name a model by --init_from=')
    origin = run and json.loads(run.read_text(encoding='utf-8'))['init_from']
    return None if is_flag and init_from not in ('resume', origin) else run

def load_before(made, cache_dir, weights):
    """-> the model that a run started from; if that is 'scratch', made again from its shape and config."""
    if made['init_from'] != 'scratch':
        return GPT.from_pretrained(made['init_from'], cache_dir, weights)
    torch.manual_seed(made['config']['seed'])
    model = GPT(GPTConfig(**made['model']))
    if made['config'].get('init') == 'copying':
        init_for_copying(model)
    return model

# --- answer

def response_text(ids):
    """New ids -> the answer's text."""
    return detokenize(ids).strip().removeprefix(HEADER_WORDS).strip()

def answer(model, rows, on_done, samples=1):
    """Answer rows; on_done(i, {'model_response', 'truncated': met the limit}) is called as each one ends.
    With samples there are so many answers to a row, one after the other."""
    prompts = [encode_prompt(row) for row in rows]

    def finish(i, ids):
        limit = min(max_new_tokens, model.config.block_size - len(prompts[i // samples]))
        on_done(i, {'model_response': response_text(ids), 'truncated': len(ids) == limit})

    with autocast:
        model.generate(prompts, max_new_tokens, temperature, top_k, seed, on_done=finish, samples=samples)

def print_answer(model, instruction, input):
    row = {'instruction': instruction, 'input': input}
    answer(model, [row], lambda i, result: print(result['model_response']))

@torch.inference_mode()
def reference_losses(model, data, numbers, device='cpu'):
    """-> per row number {'reference_loss': nats per token of the reference answer, 'reference_tokens'}."""
    results = {}
    for i in range(0, len(numbers), 8):
        batch = make_batch(data, numbers[i:i + 8], packing=False)
        ids, targets, positions = (torch.from_numpy(array).to(device) for array in batch[:3])
        losses = model(ids, targets, positions, loss_reduction='none')[1]
        counts = (targets != IGNORE).sum(1).tolist()
        for number, loss in zip(numbers[i:i + 8], losses.split(counts)):
            results[number] = {'reference_loss': loss.mean().item(), 'reference_tokens': len(loss)}
    return results

# --- write

def answer_all(model, rows, name, about, samples=1):
    """Answer rows, shared among the processes -> {i: result of the i-th answer}, `samples` of each row, one
    after the other. Answers that an interrupted run left in out_dir/<name>.part* are not computed again."""
    # each answer is appended to a part file as it comes, under a hash of all that could change it
    settings = {key: config[key] for key in ('max_new_tokens', 'temperature', 'top_k', 'seed', 'dtype')}
    text = json.dumps([about, vars(model.config), settings, rows, samples])
    key = hashlib.sha256(text.encode()).hexdigest()
    written = [one for part in sorted(out.glob(f'{name}.part*')) for one in read_jsonl(part)]
    results = {one.pop('row'): one for one in written if one.pop('key') == key}
    if results and rank == 0:
        print(f'{len(results)} of {len(rows) * samples} answers are there already')
    if world_size > 1:
        dist.barrier()  # all have read before one writes
    todo = [i for i in range(len(rows)) if not all(i * samples + n in results for n in range(samples))]
    todo = todo[rank::world_size]
    bar = tqdm(total=len(todo) * samples, unit='answer', disable=None if rank == 0 else True)
    with open(out / f'{name}.part{rank}', 'a', encoding='utf-8') as file:
        file.write('\n')  # ends a line at which it was killed

        def on_done(i, result):
            number = todo[i // samples] * samples + i % samples
            results[number] = result
            file.write(json.dumps({'key': key, 'row': number, **result}) + '\n')
            file.flush()
            bar.update()

        answer(model, [rows[i] for i in todo], on_done, samples)
    bar.close()
    everyones = [results]
    if world_size > 1:
        everyones = [None] * world_size
        dist.all_gather_object(everyones, results)
    return {i: result for one in everyones for i, result in one.items()}

def write_answers(name, rows, about, **more):
    """out_dir/<name>.json, and its provenance in <name>.about.json; the part files are no longer needed."""
    write_json(out / f'{name}.json', rows)
    write_json(out / f'{name}.about.json', {'model': about, 'config': config, **more})
    for part in out.glob(f'{name}.part*'):
        part.unlink()

def predict(model, name, about):
    """Answer the test split into out_dir/<name>.json."""
    data = read_split(dataset, 'test')
    rows = data[1]['rows']
    results = answer_all(model, rows, name, about)
    if rank == 0:
        with autocast:
            losses = reference_losses(model, data, list(range(len(rows))), device)
        rows = [row | results[i] | losses[i] for i, row in enumerate(rows)]
        write_answers(name, rows, about)
        stopped = sum(not row['truncated'] for row in rows)
        print(f'{len(rows)} answers of {about}, {stopped} of them ended by themselves: '
              f'wrote {out / name}.json')

# --- labels by self-consistency

def vote(candidates):
    """
    Sampled answers -> (label, agreement). Answers that differ in case, white space and a full stop at the end
    vote together, for what most of them say word for word. agreement: the share of all answers that vote for
    the label; empty ones and those cut at the limit have no vote. Of a tie the answer sampled first wins.
    """
    votes = {}
    for candidate in candidates:
        text = candidate['model_response']
        if text and not candidate['truncated']:
            votes.setdefault(' '.join(text.lower().split()).rstrip('.'), []).append(text)
    winners = max(votes.values(), key=len, default=[''])
    return Counter(winners).most_common(1)[0][0], len(winners) / len(candidates) if votes else 0.0

def reliability(rows):
    """Rows with agreement and reference -> per range of agreement, what share of the labels is right."""
    try:
        from scipy.stats import binomtest
    except ImportError:
        print('labels are not compared with the outputs: pip install scipy')
        return []
    table = []
    for low, high in itertools.pairwise((0, 0.25, 0.5, 0.75, 1, math.inf)):
        inside = [row for row in rows if low <= row['agreement'] < high]
        right = sum(row['output'].strip() == row['reference'].strip() for row in inside)
        if inside:
            share = binomtest(right, len(inside)).proportion_ci(method='wilson')
            table.append({
                'from': low, 'to': min(high, 1), 'rows': len(inside),
                'right': {'value': right / len(inside), 'low': float(share.low), 'high': float(share.high)}})
    return table

def label(model, about):
    """Give each row of `prompts` what most sampled answers say as its output: out_dir/pseudo-labels.json."""
    rows = [row | ({'reference': row['output']} if row.get('output') else {})
            for row in read_rows(prompts, is_answered=False)]
    results = answer_all(model, rows, LABELS, about, self_consistency)
    for i, row in enumerate(rows):
        candidates = [results[i * self_consistency + n] for n in range(self_consistency)]
        row['output'], row['agreement'] = vote(candidates)
        row['candidates'] = [one['model_response'] for one in candidates]
        row['truncated'] = sum(one['truncated'] for one in candidates)
    labelled = [row for row in rows if row['output'] and row['agreement'] >= min_agreement]
    if rank > 0:
        return
    checked = [row for row in rows if 'reference' in row]
    table = reliability(checked) if checked else []
    left_out = len(rows) - len(labelled)
    write_answers(LABELS, labelled, about, labelled=len(labelled), left_out=left_out, reliability=table)
    if table:
        print('\nagreement     rows  right')
    for line in table:
        share = '{value:6.1%} [{low:.1%}, {high:.1%}]'.format(**line['right'])
        print(f'{line["from"]:.2f} to {line["to"]:.2f}{line["rows"]:6}  {share}')
    print(f'{len(labelled)} of {len(rows)} rows got a label, to the other {left_out} too few answers agree: '
          f'wrote {out / LABELS}.json')

# --- other forms of asking

def answer_questions(model):
    """The first turn of each question (the template has room for one) into out_dir/question-answers.json."""
    try:
        lines = Path(questions).read_text(encoding='utf-8').splitlines()
        answered = [json.loads(line) for line in lines if line.strip()]
        rows = [{'instruction': question['turns'][0]} for question in answered]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f'{questions} is no JSONL of questions with turns: {error!r}') from error
    answer(model, rows, lambda i, result: answered[i].update(answers=[result['model_response']]))
    write_json(out / 'question-answers.json', answered)
    print(f'{len(answered)} answers: wrote {out}/question-answers.json')

def talk(model):
    """Answer the lines of standard input until it ends or one is empty."""
    print('an instruction a line; "instruction | input" gives it an input; an empty line or Ctrl-D ends')
    while True:
        print('> ', end='', flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            break
        instruction, _, input = line.partition('|')
        try:
            print_answer(model, instruction.strip(), input.strip())
        except ModelError as error:  # it is too long
            print(error)

if __name__ == '__main__':
    if max_new_tokens < 1 or min(temperature, top_k, self_consistency, min_agreement) < 0:
        raise UserError('max_new_tokens must be at least 1, temperature, top_k, self_consistency and '
                        'min_agreement at least 0')
    if bool(prompts) != bool(self_consistency):
        raise UserError('labels need both, --self_consistency=8 and --prompts=rows.json')
    if self_consistency and not temperature:
        temperature = config['temperature'] = 0.7  # greedy answers would all agree
    device, compute_dtype, rank, world_size = init_device(device, dtype)
    place, autocast = for_inference(device, compute_dtype)
    run = None if adapter else find_run(out_dir, init_from)
    made = json.loads(run.read_text(encoding='utf-8')) if run else {}
    if run:
        model = GPT.from_pretrained(run.with_suffix('.pth'))
        about = f'{run.with_suffix(".pth")} (step {made["step"]}, val loss {made["val_loss"]:.4f})'
    else:
        model = GPT.from_pretrained(init_from, cache_dir, weights)
        if adapter:
            load_adapter(model, adapter)
        about = f'{init_from} with {adapter}' if adapter else init_from
    place(model)
    if rank == 0:
        print(f'\nloaded {about}: {model.config.name} on {device}')

    if prompt:
        print_answer(model, prompt, input)
    elif interactive:
        talk(model)
    elif questions:
        answer_questions(model)
    elif self_consistency:
        out.mkdir(parents=True, exist_ok=True)
        label(model, about)
    else:
        out.mkdir(parents=True, exist_ok=True)
        # a released model is what tuned ones are compared with, and so is what answers instead of the run
        is_untuned = init_from in RELEASED and not adapter
        is_baseline = not run and (is_untuned or any(out.glob('*-sft.json')))
        predict(model, BEFORE if is_baseline else PREDICTIONS, about)
        if run and before:
            del model
            model = load_before(made, cache_dir, weights)
            predict(place(model), BEFORE, f'{made["init_from"]} (before fine-tuning)')
