"""chat.html in a real browser, headless, against serve.py with two models that say what SCRIPTS has."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import requests
import torch
from conftest import ROOT
from playwright.sync_api import sync_playwright

from model import GPT, GPTConfig
from prepare import get_tokenizer

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no chromium')

# the tokens after the prompt's last, '\n', and what makes them likely; the first script ends, the second does not
SCRIPTS = {'out/tiny-sft': (8, ['\n', 'Well', ',', '\n\n', '<', 'img', ' src', '=', 'x', ' on', 'error', '="', 'document', '.', 'title', "='",
                                'hacked', '\'">', ' caf', 'é', ' 🎉', ' end', '<|endoftext|>']),
           'before': (1.5, ['\n', ' Ask', ' Ann', ':', ' ann', '@', 'example', '.', 'org', ' and', ' so', ' on', ' and'])}
AFTER = """Well,\n\n<img src=x onerror="document.title='hacked'"> café 🎉 end"""
BEFORE = 'Ask Ann: [email]' + ' and so on' * 11
HOSTILE = '</script><img src=x onerror="document.title=1"> for ann@example.org, 555-123-4567, 4111 1111 1111 1111'
BACKGROUND = 'node => getComputedStyle(node).backgroundColor'


def scripted_model(scale, script):
    """A model whose MLP finds the last id in the script and adds the next one."""
    torch.manual_seed(6)
    model = GPT(GPTConfig(block_size=2048, n_layer=1, n_head=2, n_embd=64))
    ids = [id for text in script for id in get_tokenizer().encode(text, allowed_special='all')]
    with torch.no_grad():
        mlp, unit = model.h[0].mlp, torch.nn.functional.normalize(model.wte.weight, dim=1)
        for weight in model.wpe.weight, model.h[0].attn.c_proj.weight, mlp.c_fc.weight, mlp.c_proj.weight:
            weight.zero_()
        model.wte.weight.copy_(scale * unit)
        for i, (now, then) in enumerate(zip(ids, ids[1:])):
            mlp.c_fc.weight[i], mlp.c_fc.bias[i], mlp.c_proj.weight[:, i] = 32 * unit[now], -200, 8 * unit[then]
    return model


@pytest.fixture(scope='module')
def urls(tmp_path_factory):
    """Of a server, and of one with a key and without the model before tuning."""
    folder = tmp_path_factory.mktemp('chat')
    (folder / 'out').mkdir()
    for path, script in SCRIPTS.items():
        model = scripted_model(*script)
        torch.save(model.state_dict(), folder / f'{path}.pth')
        (folder / f'{path}.json').write_text(json.dumps({
            'model': asdict(model.config), 'init_from': str(folder / 'before.pth'), 'config': {'seed': 1}, 'step': 1, 'val_loss': 1.0}))
    found = []
    with contextlib.ExitStack() as stack:
        for flag, key in (('--max_new_tokens=1900', ''), ('--before=False', 'sesame')):
            process = subprocess.Popen([sys.executable, ROOT / 'serve.py', '--port=0', flag], cwd=folder, text=True,
                                       stdout=subprocess.PIPE, env=os.environ | {'SERVE_API_KEY': key})
            stack.callback(process.wait)
            stack.callback(process.kill)
            found.append(process)
        yield [re.search(r'(?m)^tiny-sft.*: (http:.*)$', ''.join(iter(process.stdout.readline, '')))[1] for process in found]


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, urls):
    """The page with its models listed; at the end of each test: no error, no request to others, nothing that ran."""
    context, faults = browser.new_context(), []
    page = context.new_page()
    page.on('console', lambda message: faults.append(message.text))  # violations of the policy, too
    page.on('pageerror', lambda error: faults.append(str(error)))
    page.on('request', lambda request: request.url.startswith((urls[0], 'data:')) or faults.append(request.url))
    page.goto(urls[0])
    page.wait_for_selector('#mode')
    yield page
    assert not faults and page.title() == 'Ask the tuned GPT-2'
    context.close()


def ask(page, text='Say it.', which='after tuning', max_tokens=40):
    if page.is_visible('#mode'):
        page.get_by_label(which).check()
    page.fill('#instruction', text)
    page.locator('#max_tokens').evaluate('(node, n) => node.value = n', max_tokens)
    page.click('#send')


def finish(page):
    page.wait_for_selector('#send:enabled')
    assert page.locator('.error:visible').all_text_contents() == []


def test_both_models_answer_as_without_streaming_and_what_is_masked_stays_so(page, urls):
    ask(page, which='side by side')
    finish(page)
    wholes = [requests.post(f'{urls[0]}/v1/chat/completions', timeout=60, json={
        'model': model, 'messages': [{'role': 'user', 'content': 'Say it.'}], 'max_tokens': 40}).json()
        for model in ('tiny-before', 'tiny-sft')]
    shown = page.locator('.text').all_text_contents()
    assert shown == [whole['choices'][0]['message']['content'] for whole in wholes] == [BEFORE[:len(shown[0])], AFTER]
    ends = page.locator('.answer .row .small').all_text_contents()
    assert [end.split(' tokens/s')[0].split(',')[0] for end in ends] == [f'{whole["usage"]["completion_tokens"]} tokens' for whole in wholes]
    assert [end.split(', ')[-1] for end in ends] == ['cut at max tokens', 'ended by itself']


def test_tokens_are_coloured_and_tell_their_alternatives(page):
    ask(page, which='side by side')
    finish(page)
    tokens = page.locator('.after .token')
    assert ''.join(tokens.all_text_contents()) == AFTER and '🎉' in tokens.all_text_contents()  # which has three tokens
    legend = dict(zip('01234', (node.evaluate(BACKGROUND) for node in page.locator('#legend .token').all())))
    colours = {place: page.locator(f'.{place} .token').first.evaluate(BACKGROUND) for place in ('before', 'after')}
    assert colours == {'before': legend['2'], 'after': legend['4']} and len(set(legend.values())) == 5
    tip = page.locator('#tip')
    tokens.nth(4).hover()
    assert re.fullmatch(r'“img” 100.0 %Instead of it:(“.*?” under 0.1 %){4,5}', tip.text_content(), re.DOTALL)
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    page.locator('.before button').focus()  # the next stop is a token of the other answer
    for key, text in (('Tab', '“Well”'), ('ArrowRight', '“,”'), ('ArrowRight', '“↵↵”'), ('End', '“ end”')):
        page.keyboard.press(key)
        assert tip.text_content().startswith(text)
    page.keyboard.press('Escape')
    assert tip.is_hidden()


def test_stop_ends_an_answer(page, urls):
    ask(page, which='before tuning', max_tokens=1900)
    page.wait_for_function("document.querySelector('.text').textContent.includes('and so on')")
    page.click('#stop')
    finish(page)
    assert page.locator('.answer .row .small').text_content().endswith('stopped by you')
    assert BEFORE[:30] in page.locator('.text').text_content() and page.evaluate('document.activeElement.id') == 'send'
    for _ in range(100):
        if 'active_rows 0.0' in requests.get(f'{urls[0]}/metrics', timeout=60).text:
            break
        time.sleep(0.05)
    else:
        raise AssertionError('the server went on')


def test_a_hostile_instruction_stays_text_and_the_history_is_kept_until_cleared(page):
    ask(page, HOSTILE)  # with personal data
    finish(page)
    page.reload()
    past = page.locator('#past button')
    assert past.all_text_contents() == [HOSTILE]
    past.click()
    assert page.locator('.text').text_content() == AFTER and page.input_value('#instruction') == HOSTILE
    assert page.locator('img').count() == 0
    page.click('#clear')
    page.reload()
    assert past.count() == 0


def test_a_phone_the_dark_and_labels(page):
    page.set_viewport_size({'width': 360, 'height': 740})
    ask(page, 'W' * 200, 'side by side')
    finish(page)
    page.click('summary')
    page.locator('.after .token').last.focus()
    box = page.locator('#tip').bounding_box()
    assert page.evaluate('document.documentElement.scrollWidth') <= 360 and 0 <= box['x'] <= box['x'] + box['width'] <= 360
    places = [page.locator(place).first for place in ('body', '.card', '.token', '#send')]
    light = [place.evaluate(BACKGROUND) for place in places]
    page.emulate_media(color_scheme='dark')
    assert all(place.evaluate(BACKGROUND) != colour for place, colour in zip(places, light))
    assert page.evaluate("[...document.querySelectorAll('input, textarea')].filter(node => !node.labels.length).length") == 0


def test_a_key_is_asked_for(browser, urls):
    page = browser.new_page()
    page.goto(urls[1])
    for key, hidden in (('wrong', False), ('sesame', True)):
        page.locator('#key').fill(key)
        page.keyboard.press('Enter')
        page.wait_for_function("document.getElementById('problem').textContent.includes('API key') !== " + json.dumps(hidden))
    assert page.is_hidden('#key-form') and page.is_hidden('#mode')  # one model only
    page.reload()
    ask(page)
    finish(page)
    assert page.locator('.text').text_content() == AFTER
