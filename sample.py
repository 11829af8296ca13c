"""
Answer the test split with the fine-tuned model and with the one it came from; or one prompt; or talk.

    python sample.py config/sft_medium.py
    python sample.py config/sft_medium.py --prompt="Rewrite the sentence in passive voice." --input="The cat ate the fish."
    python sample.py config/sft_medium.py --interactive=True
    torchrun --nproc_per_node=2 sample.py config/sft_medium.py
"""
import hashlib
import json
import sys
from pathlib import Path

import cpu  # noqa: F401 (before torch)
import torch
import torch.distributed as dist
from tqdm import tqdm

from batch import IGNORE, make_batch
from config import UserError, configure
from files import write_json
from lora import load_adapter
from model import GPT, GPTConfig, start_machine
from prepare import decode, encode_prompt, read_split

# -----------------------------------------------------------------------------
# model
out_dir = 'out'  # the run: its <model>-sft.pth answers
init_from = 'gpt2-medium'  # what it came from answers too; another one than the run's answers instead of it
adapter = ''  # an adapter.safetensors to put on init_from
weights = 'openai'  # whose files of a GPT-2 name come first: 'openai', 'huggingface'
cache_dir = ''  # where they are kept; empty: gpt2-sft in the user's cache folder
n_layer = 12  # of a model from scratch
n_head = 12  # of a model from scratch
n_embd = 768  # of a model from scratch
block_size = 1024  # of a model from scratch
# what is answered
dataset = 'instruction-data'  # its test split
before = True  # let the model before fine-tuning answer the test split too
prompt = ''  # one instruction instead
input = ''  # and its input
interactive = False  # talk with the terminal instead
questions = ''  # a JSONL file of questions instead, like data/questions.jsonl, for judge.py --judge_style=mtbench
# how
max_new_tokens = 256
temperature = 0.0  # 0: greedy
top_k = 0  # sample among the k likeliest; 0: among all
seed = 123  # of the sampling
device = 'auto'  # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'  # 'auto' (bfloat16 on cuda, else float32), 'float32', 'bfloat16'
# -----------------------------------------------------------------------------
config = configure(globals())

device, autocast, rank, world = start_machine(device, dtype)
out = Path(out_dir)
if max_new_tokens < 1 or temperature < 0 or top_k < 0:
    raise UserError('max_new_tokens starts at 1, temperature and top_k at 0')


def find_run():
    """-> the .json of the newest run in out_dir; None if there is none, or init_from was set to name another model."""
    runs = sorted(out.glob('*-sft.json'), key=lambda path: path.stat().st_mtime)
    if adapter or not runs or init_from not in ('gpt2-medium', 'resume', json.loads(runs[-1].read_text())['init_from']):
        return None
    return runs[-1]


def load_origin(init_from):
    """-> the model before fine-tuning, the one that train.py starts with."""
    if init_from == 'scratch':
        torch.manual_seed(seed)
        model = GPT(GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    else:
        model = GPT.from_pretrained(init_from, cache_dir=cache_dir, weights=weights)
    if adapter:
        load_adapter(model, adapter)
    return model


def answer(model, rows, on_done=lambda i, result: None):
    """rows -> for each {'model_response', 'truncated': it met the limit and did not end by itself}; on_done as they come."""
    prompts = [encode_prompt(row) for row in rows]

    def finish(i, ids):
        limit = min(max_new_tokens, model.config.block_size - len(prompts[i]))
        text = decode(ids).strip().removeprefix('### Response:').strip()
        on_done(i, {'model_response': text, 'truncated': len(ids) == limit})

    with autocast:
        model.generate(prompts, max_new_tokens, temperature, top_k, seed, on_done=finish)


@torch.inference_mode()
def reference_losses(model, data, numbers):
    """-> for each row {'reference_loss': nats a token of the reference answer, 'reference_tokens'}."""
    results = []
    for i in range(0, len(numbers), 8):
        batch = make_batch(data, numbers[i:i + 8], packing=False)
        ids, targets, positions = (torch.from_numpy(array).to(device) for array in batch[:3])
        with autocast:
            losses = model(ids, targets, positions, each=True)[1]
        counts = (targets != IGNORE).sum(1).tolist()
        results += [{'reference_loss': part.mean().item(), 'reference_tokens': len(part)} for part in losses.split(counts)]
    return results


def predict(model, name, about):
    """Answer the test split into out_dir/name. Rows that an interrupted start with the same settings answered are kept."""
    data = read_split(dataset, 'test')
    rows, path = data[1]['rows'], out / name
    settings = {key: config[key] for key in ('max_new_tokens', 'temperature', 'top_k', 'seed', 'dtype')}
    key = hashlib.sha256(json.dumps([about, vars(model.config), settings, rows]).encode()).hexdigest()
    parts, done = sorted(out.glob(f'{path.stem}.part*')), {}
    for part in parts:
        for line in part.read_text().splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line at which it was killed
            if found.pop('key') == key:
                done[found.pop('row')] = found
    if world > 1:
        dist.barrier()  # all have read before one writes
    todo = [i for i in range(len(rows)) if i not in done][rank::world]
    if done and rank == 0:
        print(f'{len(done)} of {len(rows)} answers are there already')
    bar = tqdm(total=len(todo), unit='row', disable=None if rank == 0 else True)
    with open(out / f'{path.stem}.part{rank}', 'a') as file:
        file.write('\n')  # ends a line at which it was killed

        def on_done(i, result):
            done[todo[i]] = result
            file.write(json.dumps({'key': key, 'row': todo[i], **result}) + '\n')
            file.flush()
            bar.update()

        answer(model, [rows[i] for i in todo], on_done)
    bar.close()
    share = range(len(rows))[rank::world]
    losses = dict(zip(share, reference_losses(model, data, share)))
    shares = [(done, losses)]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, (done, losses))
    if rank == 0:
        results = {i: {} for i in range(len(rows))}
        for i, result in (pair for dicts in shares for one in dicts for pair in one.items()):
            results[i] |= result
        write_json(path, [{**row, **results[i]} for i, row in enumerate(rows)])
        write_json(path.with_suffix('.about.json'), {'model': about, 'config': config})
        for part in out.glob(f'{path.stem}.part*'):
            part.unlink()
        stopped = sum(not result['truncated'] for result in results.values())
        print(f'{len(rows)} answers of {about}, {stopped} of them ended by themselves: wrote {path}')


run, model, about = find_run(), None, init_from
if run:
    made = json.loads(run.read_text())
    model = GPT.from_pretrained(run.with_suffix('.pth'))
    about = f'{run.with_suffix(".pth")} (step {made["step"]}, val loss {made["val_loss"]:.4f})'
    origin = made['init_from']
else:
    model, origin = load_origin(init_from), ''
    about += f' with {adapter}' if adapter else ' (before fine-tuning)'
model.to(device).eval()
if rank == 0:
    print(f'\nloaded {about}: {model.config.name} on {device}')

if prompt:
    answer(model, [{'instruction': prompt, 'input': input}], lambda i, result: print(result['model_response']))
elif interactive:
    print('an instruction a line; "instruction | input" gives it an input; an empty line or Ctrl-D ends')
    while line := (print('> ', end='', flush=True), sys.stdin.readline().strip())[1]:
        instruction, _, text = map(str.strip, line.partition('|'))
        answer(model, [{'instruction': instruction, 'input': text}], lambda i, result: print(result['model_response']))
elif questions:
    try:
        asked = [json.loads(line) for line in Path(questions).read_text(encoding='utf-8').splitlines() if line.strip()]
        rows = [{'instruction': question['turns'][0]} for question in asked]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f'{questions} is no JSONL of questions with turns: {error!r}') from error
    # the first turn only: the template of these models has room for one
    answer(model, rows, lambda i, result: asked[i].update(answers=[result['model_response']]))
    write_json(out / 'question-answers.json', asked)
    print(f'{len(asked)} answers: wrote {out}/question-answers.json')
else:
    out.mkdir(parents=True, exist_ok=True)
    predict(model, 'instruction-data-with-response.json' if run else 'instruction-data-with-response-before.json', about)
    if run and before:
        del model
        about = f'{origin} (before fine-tuning)'
        predict(load_origin(origin).to(device).eval(), 'instruction-data-with-response-before.json', about)
