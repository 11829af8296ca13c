"""chat.html in a real browser, headless, against serve.py with two models that say what SCRIPTS has."""
import json
import re
import shutil
from dataclasses import asdict

from model import GPT, GPTConfig
from prepare import get_tokenizer

import pytest
import requests
import torch
from conftest import stage
from playwright.sync_api import expect, sync_playwright
from test_serve import serving

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no chromium')

# how likely each of its tokens is, and the tokens, of which the first ends the prompt; the second one goes on without end
SCRIPTS = {
    'out/tiny-sft': (8, ['\n', 'Well', ',', '\n\n', '<', 'img', ' src', '=', 'x', '>', ' caf', 'é', ' 🎉', '.', '<|endoftext|>']),
    'before': (1.5, ['\n', ' Ask', ' Ann', ':', ' ann', '@', 'example', '.', 'org', ' and', ' so', ' on', ' and'])}
AFTER = 'Well,\n\n<img src=x> café 🎉.'
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
def folder(tmp_path_factory):
    """A run with the rows that it was trained on."""
    folder = tmp_path_factory.mktemp('chat')
    (folder / 'out').mkdir()
    rows = [{'instruction': f'{family.capitalize()} it, {n}.', 'input': f'Word {n}.' * (n % 2), 'output': 'x', 'family': family}
            for n in range(40) for family in ('turn', 'colour', 'count')]
    (folder / 'rows.json').write_text(json.dumps(rows))
    stage(folder, 'prepare.py', '--source=rows.json', '--dataset=mine')
    sha256 = json.loads((folder / 'data/mine/test.json').read_text())['sha256']
    for path, script in SCRIPTS.items():
        model = scripted_model(*script)
        torch.save(model.state_dict(), folder / f'{path}.pth')
        (folder / f'{path}.json').write_text(json.dumps({
            'model': asdict(model.config), 'init_from': str(folder / 'before.pth'), 'config': {'seed': 1, 'dataset': 'mine'}, 'sha256': sha256,
            'step': 1, 'val_loss': 1.0}))
    return folder


@pytest.fixture(scope='module')
def urls(folder):
    """Of a server, and of one with a key and without the model before tuning."""
    with (serving(folder, '--filters=pii', '--max_new_tokens=1900') as (url, _),
          serving(folder, '--filters=', '--before=False', env={'SERVE_API_KEY': 'sesame'}) as (guarded, _)):
        yield url, guarded


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, urls):
    """The page with its models listed; at the end of each test: no error, no request to others, nothing that ran."""
    page, faults = browser.new_page(), []
    page.on('console', lambda message: faults.append(message.text))  # violations of the policy, too
    page.on('pageerror', lambda error: faults.append(str(error)))
    page.on('request', lambda request: request.url.startswith((urls[0], 'data:')) or faults.append(request.url))
    page.goto(urls[0])
    page.wait_for_selector('#mode')
    yield page
    assert not faults and page.title() == 'Ask the tuned GPT-2'
    page.close()


def ask(page, text='Say it.', which='after tuning', max_tokens=40, stop_at=''):
    page.get_by_label(which).check()
    page.fill('#instruction', text)
    page.locator('#max_tokens').evaluate('(node, n) => node.value = n', max_tokens)
    page.click('#send')
    if stop_at:
        expect(page.locator('.text')).to_contain_text(stop_at)
        page.click('#stop')
    expect(page.locator('#stop')).to_be_disabled(timeout=30_000)
    expect(page.locator('.error:visible')).to_have_count(0)


def test_both_models_answer_as_without_streaming(page, urls):
    ask(page, which='side by side')
    for place, model, expected in (('.before', 'tiny-before', BEFORE), ('.after', 'tiny-sft', AFTER)):
        whole = requests.post(f'{urls[0]}/v1/chat/completions', timeout=60, json={
            'model': model, 'messages': [{'role': 'user', 'content': 'Say it.'}], 'max_tokens': 40}).json()
        shown, end = page.text_content(f'{place} .text'), page.text_content(f'{place} .row .small').split(', ')
        assert expected.startswith(shown) and shown == whole['choices'][0]['message']['content']
        assert end[0] == f'{whole["usage"]["completion_tokens"]} tokens'
        assert end[2] == {'length': 'cut at max tokens', 'stop': 'ended by itself'}[whole['choices'][0]['finish_reason']]


def test_tokens_are_coloured_and_tell_their_alternatives(page):
    ask(page, which='side by side')
    tokens, tip = page.locator('.after .token'), page.locator('#tip')
    assert ''.join(tokens.all_text_contents()) == AFTER and '🎉' in tokens.all_text_contents()  # which is three tokens
    legend = [node.evaluate(BACKGROUND) for node in page.locator('#legend .token').all()]
    before, after = (page.locator(f'{place} .token').first.evaluate(BACKGROUND) for place in ('.before', '.after'))
    assert len(set(legend)) == 5 and before == legend[2] and after == legend[4]
    tokens.get_by_text('img').hover()
    expect(tip).to_have_text(re.compile('^“img” 100.0 %Instead of it:(“[^”]*” under 0.1 %){4}$'))
    page.mouse.move(1, 1)
    expect(tip).to_be_hidden()
    page.locator('.before button').focus()  # the next stop is a token of the other answer
    for key, text in (('Tab', '“Well”'), ('ArrowRight', '“,”'), ('ArrowRight', '“↵↵”'), ('End', '“.”')):
        page.keyboard.press(key)
        assert tip.text_content().startswith(text)
    page.keyboard.press('Escape')
    expect(tip).to_be_hidden()


def test_stop_ends_an_answer(page, urls):
    ask(page, which='before tuning', max_tokens=1900, stop_at='and so on')
    expect(page.locator('.answer .row .small')).to_have_text(re.compile('stopped by you$'))
    expect(page.locator('#send')).to_be_focused()
    page.wait_for_timeout(700)  # the server looks twice a second
    assert 'active_rows 0.0' in requests.get(f'{urls[0]}/metrics', timeout=60).text


def test_hostile_text_stays_text_and_the_history_is_kept_until_cleared(page):
    ask(page, HOSTILE)  # with personal data
    page.reload()
    past = page.locator('#past button')
    expect(past).to_have_text(HOSTILE)
    past.click()
    assert page.text_content('.text') == AFTER and page.input_value('#instruction') == HOSTILE
    expect(page.locator('img')).to_have_count(0)
    page.click('#clear')
    page.reload()
    expect(past).to_have_count(0)


def test_a_phone_the_dark_and_labels(page):
    page.set_viewport_size({'width': 360, 'height': 740})
    ask(page, 'W' * 200, 'side by side')
    page.click('summary')
    page.locator('.after .token').last.focus()
    tip = page.locator('#tip').bounding_box()
    assert page.evaluate('document.documentElement.scrollWidth') == 360 and 0 <= tip['x'] <= 360 - tip['width']
    places = [page.locator(place).first for place in ('body', '.card', '.token', '#send')]
    light = [place.evaluate(BACKGROUND) for place in places]
    page.emulate_media(color_scheme='dark')
    assert all(place.evaluate(BACKGROUND) != colour for place, colour in zip(places, light))
    assert page.locator('input, textarea').evaluate_all('nodes => nodes.every(node => node.labels.length)')


def test_a_key_is_asked_for(browser, urls):
    page = browser.new_page()
    page.goto(urls[1])
    for key in ('wrong', 'sesame'):
        page.locator('#key').fill(key)
        page.keyboard.press('Enter')
        expect(page.locator('#problem')).to_have_text('' if key == 'sesame' else re.compile('API key'))
    page.reload()
    page.fill('#instruction', 'Say it.')
    page.keyboard.press('Enter')
    expect(page.locator('.text')).to_have_text(AFTER)
    assert page.is_hidden('#key-form') and page.is_hidden('#mode')  # it has one model only


def test_the_examples_are_rows_of_the_runs_own_test_split(page, folder):
    """One of each family; a model of other rows, or none, offers general ones."""
    rows = json.loads((folder / 'data/mine/test.json').read_text())['rows']
    buttons = page.locator('#examples button')
    assert sorted(buttons.all_text_contents()) == ['colour', 'count', 'turn']
    buttons.get_by_text('colour').click()
    shown = page.input_value('#instruction'), page.input_value('#input')
    assert shown in [(row['instruction'], row['input']) for row in rows if row['family'] == 'colour']


def test_a_model_that_is_not_tuned_is_not_said_to_be(browser, folder):
    with serving(folder, '--init_from=before.pth', '--host=::1') as (url, _):
        assert url.startswith('http://[::1]:')
        page = browser.new_page()
        page.goto(url)
        expect(page.locator('h1')).to_have_text('Ask GPT-2, not tuned')
        page.fill('#instruction', 'Say it.')
        page.keyboard.press('Enter')
        expect(page.locator('.answer h2')).to_have_text('Not tuned')
        assert 'opposite' in page.locator('#examples button').all_text_contents()
        page.close()


def test_the_enter_that_ends_a_word_in_an_input_method_sends_nothing(page):
    """Chrome sends it while composing, Safari after that, as keyCode 229."""
    asked = []
    page.on('request', lambda request: request.method == 'POST' and asked.append(request.url))
    page.fill('#instruction', 'にほん')
    for init in ({'isComposing': True, 'keyCode': 229}, {'keyCode': 229}, {'keyCode': 13}):
        assert not asked
        page.locator('#instruction').dispatch_event('keydown', {'key': 'Enter', 'bubbles': True, **init})
    expect(page.locator('#stop')).to_be_disabled(timeout=30_000)
    assert asked


def test_the_page_works_below_a_path(browser, urls):
    """As behind a notebook server's proxy, which hands on what is below its path."""
    page = browser.new_page()
    page.route('http://hub.example/user/ann/proxy/8000/**', lambda route: route.fulfill(
        response=route.fetch(url=route.request.url.replace('http://hub.example/user/ann/proxy/8000', urls[0]))))
    page.goto('http://hub.example/user/ann/proxy/8000/')
    page.wait_for_selector('#mode')
    ask(page)
    expect(page.locator('.text')).to_have_text(AFTER)
    page.close()
