"""
Write the rows of the demo, data/demo.json, and a family of tasks held back from it, data/demo_heldback.json.

    python data/make_demo.py

The rows are made of a small vocabulary, so that a network of a few million weights meets each word often enough to learn
it in a minute. What it is tested on are sentences, lists and sums that it has not met.
"""
import json
import random
from pathlib import Path

SEED = 123

# --- the words

# base, third person, past, participle: what it is done to
VERBS = {
    'open opens opened opened': 'door window box letter gate',
    'close closes closed closed': 'door window box book gate',
    'paint paints painted painted': 'door wall house chair gate',
    'wash washes washed washed': 'car shirt plate window horse',
    'build builds built built': 'house wall bridge boat',
    'write writes wrote written': 'letter book song story',
    'draw draws drew drawn': 'map house horse bridge',
    'buy buys bought bought': 'car house book horse boat shirt',
    'sell sells sold sold': 'car house book horse boat bread',
    'find finds found found': 'key map coin letter shirt',
    'break breaks broke broken': 'plate window chair box',
    'cook cooks cooked cooked': 'soup rice fish',
    'eat eats ate eaten': 'soup rice fish bread',
    'hide hides hid hidden': 'key coin box letter map',
    'move moves moved moved': 'chair box plate boat',
    'steal steals stole stolen': 'key car coin horse bread',
}
DEEDS = [(verb.split(), thing) for verb, things in VERBS.items() for thing in things.split()]
PEOPLE = 'farmer teacher doctor singer sailor king queen pilot nurse artist driver judge'.split()
NAMES = 'Anna Peter Tom Mary David Paul'.split()
CITIES = 'Paris London Rome Berlin Dublin Boston'.split()
TRAITS = 'old young tall happy sad rich poor strong'.split()
MOODS = 'happy sad rich poor strong weak'.split()
# what can be said of a thing, so that its opposite can be said of it too
LOOKS = {
    'big small old new clean dirty': 'car house boat shirt plate chair',
    'wet dry': 'box wall book shirt coin',
    'open closed': 'door window gate box book letter',
    'full empty': 'box plate boat house',
    'long short': 'letter book story song bridge map',
    'hot cold': 'soup bread fish rice plate',
}
SCENES = [('the ' + thing, look) for looks, things in LOOKS.items() for thing in things.split() for look in looks.split()]
SCENES += [(who, mood) for who in NAMES + ['the ' + person for person in PEOPLE] for mood in MOODS]
OPPOSITES = {}
for pair in 'big small|old new|clean dirty|wet dry|open closed|full empty|long short|hot cold|happy sad|rich poor|strong weak'.split('|'):
    a, b = pair.split()
    OPPOSITES |= {a: b, b: a}
PLURALS = dict(pair.split(':') for pair in (
    'box:boxes key:keys coin:coins car:cars boat:boats house:houses book:books letter:letters story:stories chair:chairs '
    'horse:horses knife:knives city:cities bus:buses man:men woman:women child:children baby:babies'
).split())
KINDS = {
    'animal': 'horse dog cat cow lion tiger'.split(),
    'fruit': 'apple banana lemon orange peach'.split(),
    'tool': 'hammer saw drill knife'.split(),
    'vehicle': 'car bus train boat'.split(),
    'instrument': 'piano violin guitar drum'.split(),
}
TYPOS = dict(pair.split(':') for pair in (
    'farmer:famer teacher:techer doctor:docter singer:singar sailor:sailer queen:qeen pilot:pilott nurse:nurce '
    'artist:artest driver:drivver judge:juge window:windo letter:leter bridge:brige house:huose chair:chiar '
    'bread:braed shirt:shrit plate:plaet'
).split())
UNITS = {('weeks', 'days'): 7, ('hours', 'minutes'): 60, ('meters', 'centimeters'): 100, ('kilograms', 'grams'): 1000}
NUMBERS = 'zero one two three four five six seven eight nine'.split()

# --- the tasks: each function draws what is asked about, and the answer


def start(text):
    return text[0].upper() + text[1:]


def article(word):
    return f'an {word}' if word[0] in 'aeiou' else f'a {word}'


def deed(rng):
    """-> who, (base, third person, past, participle), to what"""
    who = rng.choice(NAMES) if rng.random() < 0.3 else 'the ' + rng.choice(PEOPLE)
    verb, thing = rng.choice(DEEDS)
    return who, verb, 'the ' + thing


def past_tense(rng):
    who, (_, now, past, _), what = deed(rng)
    return start(f'{who} {now} {what}.'), start(f'{who} {past} {what}.')


def future_tense(rng):
    who, (base, now, _, _), what = deed(rng)
    return start(f'{who} {now} {what}.'), start(f'{who} will {base} {what}.')


def passive_voice(rng):
    who, (_, _, past, participle), what = deed(rng)
    return start(f'{who} {past} {what}.'), start(f'{what} was {participle} by {who}.')


def active_voice(rng):
    active, passive = passive_voice(rng)
    return passive, active


def question(rng):
    thing, look = rng.choice(SCENES)
    who, (base, _, past, _), what = deed(rng)
    return rng.choice([
        (start(f'{thing} is {look}.'), f'Is {thing} {look}?'),
        (start(f'{who} {past} {what}.'), f'Did {who} {base} {what}?'),
    ])


def negation(rng):
    thing, look = rng.choice(SCENES)
    who, (base, _, past, _), what = deed(rng)
    return rng.choice([
        (start(f'{thing} is {look}.'), start(f'{thing} is not {look}.')),
        (start(f'{who} {past} {what}.'), start(f'{who} did not {base} {what}.')),
    ])


def opposite_word(rng):
    word = rng.choice(list(OPPOSITES))
    return word, f'The opposite of {word} is {OPPOSITES[word]}.'


def opposite_sentence(rng):
    thing, look = rng.choice(SCENES)
    return start(f'{thing} is {look}.'), start(f'{thing} is {OPPOSITES[look]}.')


def plural_word(rng):
    word = rng.choice(list(PLURALS))
    return word, f'The plural of {word} is {PLURALS[word]}.'


def plural_phrase(rng):
    noun = rng.choice(list(PLURALS))
    look = rng.choice(TRAITS if noun in ('man', 'woman', 'child', 'baby') else 'old new big small red green white black'.split())
    return f'the {look} {noun}', f'the {look} {PLURALS[noun]}'


def category(rng):
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    return article(word), start(f'{article(word)} is {article(kind)}.')


def member_of(kind):
    def draw(rng):
        kinds = [kind] + rng.sample([other for other in KINDS if other != kind], 2)
        words = [article(rng.choice(KINDS[k])) for k in kinds]
        return ', '.join(rng.sample(words, 3)), f'{start(words[0])} is {article(kind)}.'
    return draw


def alphabetical(rng):
    words = rng.sample(PEOPLE, 3)
    return ', '.join(words), 'Sorted: ' + ', '.join(sorted(words))


def ascending(rng):
    numbers = rng.sample(range(1, 11), 3)
    return ', '.join(map(str, numbers)), 'Sorted: ' + ', '.join(map(str, sorted(numbers)))


def descending(rng):
    numbers = rng.sample(range(1, 11), 3)
    return ', '.join(map(str, numbers)), 'Sorted: ' + ', '.join(map(str, sorted(numbers, reverse=True)))


def counting(rng):
    words = rng.sample(list(PLURALS), rng.randint(2, 6))
    return ', '.join(words), f'There are {NUMBERS[len(words)]} words in the list.'


def arithmetic(rng):
    a, b = rng.randint(1, 10), rng.randint(1, 5)
    return rng.choice([(f'{a} + {b}', f'The answer is {a + b}.'), (f'{a + b} - {b}', f'The answer is {a}.')])


def larger(rng):
    a, b = rng.sample(range(1, 16), 2)
    return f'{a} or {b}', f'The larger number is {max(a, b)}.'


def smaller(rng):
    a, b = rng.sample(range(1, 16), 2)
    return f'{a} or {b}', f'The smaller number is {min(a, b)}.'


def units(rng):
    (big, small), factor = rng.choice(list(UNITS.items()))
    n = rng.randint(2, 9)
    return f'{n} {big} to {small}', f'That is {n * factor} {small}.'


def spelling(rng):
    verb, thing = rng.choice(DEEDS)
    person = rng.choice(PEOPLE)
    wrong = rng.choice([word for word in (person, thing) if word in TYPOS] or [''])
    right = f'The {person} {verb[2]} the {thing}.'
    return wrong and right.replace(wrong, TYPOS[wrong]), right


def capitals(rng):
    name, other = rng.sample(NAMES, 2)
    city = rng.choice(CITIES)
    right = rng.choice([f'{name} lives in {city}.', f'{name} and {other} live in {city}.',
                        f'My friend {name} is in {city}.', f'{name} went to {city} with {other}.'])
    return right.lower(), right


def find_verb(rng):
    who, verb, what = deed(rng)
    return start(f'{who} {verb[2]} {what}.'), f"The verb is '{verb[2]}'."


def find_adjective(rng):
    trait = rng.choice(TRAITS)
    verb, thing = rng.choice(DEEDS)
    return f'The {trait} {rng.choice(PEOPLE)} {verb[2]} the {thing}.', f"The adjective is '{trait}'."


# family, rows, function, wordings. '{}' stands where the question goes; without it, the question is the input.
TASKS = [
    ('past tense', 180, past_tense, [
        'Rewrite the sentence in the past tense.', 'Change the sentence to the past tense.',
        'Convert the following sentence to the past tense.', 'Put this sentence into the past tense: {}']),
    ('future tense', 180, future_tense, [
        'Rewrite the sentence in the future tense.', 'Change the sentence to the future tense.',
        'Convert the following sentence to the future tense.', 'Put this sentence into the future tense: {}']),
    ('passive voice', 240, passive_voice, [
        'Rewrite the sentence in the passive voice.', 'Change the sentence to the passive voice.',
        'Convert the active sentence to passive.', 'Put this sentence into the passive voice: {}']),
    ('question', 220, question, [
        'Rewrite the sentence as a question.', 'Turn the statement into a question.',
        'Change the following sentence into a question.', 'Turn this sentence into a question: {}']),
    ('negation', 220, negation, [
        'Make the sentence negative.', 'Rewrite the sentence in the negative form.',
        'Negate the following sentence.', 'Turn this sentence into its negative: {}']),
    ('opposites', 70, opposite_word, [
        'What is the opposite of {}?', 'What is an antonym of {}?', 'Give the opposite of the word {}.',
        'Name a word that means the opposite of {}.']),
    ('opposites', 170, opposite_sentence, [
        'Replace the adjective with its opposite.', 'Rewrite the sentence with the opposite adjective.',
        'Change the adjective to its antonym: {}']),
    ('plural', 60, plural_word, [
        'What is the plural of {}?', 'What is the plural form of {}?', 'Give the plural of the noun {}.',
        'Write down the plural form of the word {}.']),
    ('plural', 140, plural_phrase, [
        'Rewrite the phrase in the plural.', 'Make the noun plural.', 'Change the noun in this phrase to the plural: {}']),
    ('categories', 80, category, [
        'Is {} an animal, a fruit, a tool, a vehicle or an instrument?', 'What kind of thing is {}?',
        'To which category does {} belong?', 'Classify {} by its category.']),
    *(('categories', 44, member_of(kind), [
        f'Find the {kind} in the list.', f'Which of the following is {article(kind)}?',
        f'Which of these is {article(kind)}: {{}}?']) for kind in KINDS),
    ('alphabetical order', 260, alphabetical, [
        'Sort the words in alphabetical order.', 'Arrange the following words alphabetically.',
        'Put the list in alphabetical order.', 'Put these words in alphabetical order: {}']),
    ('sorting', 120, ascending, [
        'Sort the numbers in ascending order.', 'Arrange the numbers from smallest to largest.',
        'Put these numbers in ascending order: {}']),
    ('sorting', 120, descending, [
        'Sort the numbers in descending order.', 'Arrange the numbers from largest to smallest.',
        'Put these numbers in descending order: {}']),
    ('counting', 160, counting, [
        'Count the words in the list.', 'How many words are in the list?', 'How many words does the following list have?',
        'Count the words in this list: {}']),
    ('arithmetic', 180, arithmetic, [
        'What is {}?', 'Calculate {}.', 'Work out {}.', 'Find the result of {}.']),
    ('comparison', 120, larger, [
        'Which number is larger, {}?', 'Which of the two numbers is larger?', 'Find the larger number.']),
    ('comparison', 120, smaller, [
        'Which number is smaller, {}?', 'Which of the two numbers is smaller?', 'Find the smaller number.']),
    ('units', 110, units, [
        'Convert {}.', 'Please convert {}.', 'Convert the unit: {}', 'Do this conversion: {}']),
    ('spelling', 220, spelling, [
        'Correct the spelling mistake in the sentence.', 'Fix the misspelled word.',
        'Rewrite the sentence with the correct spelling.', 'Correct the spelling of this sentence: {}']),
    ('capital letters', 240, capitals, [
        'Add the missing capital letters.', 'Correct the capitalization of the sentence.',
        'Rewrite the sentence with proper capital letters.', 'Capitalize this sentence correctly: {}']),
    ('finding words', 110, find_verb, [
        'Identify the verb in the sentence.', 'Find the verb in the sentence.', 'What is the verb in this sentence? {}']),
    ('finding words', 110, find_adjective, [
        'Identify the adjective in the sentence.', 'Find the adjective in the sentence.',
        'What is the adjective in this sentence? {}']),
]
HELD_BACK = [
    ('active voice', 300, active_voice, [
        'Rewrite the sentence in the active voice.', 'Change the sentence to the active voice.',
        'Convert the passive sentence to active.', 'Put this sentence into the active voice: {}']),
]
# too few words for as many rows: these are asked in every wording, all others once
WORDS = opposite_word, plural_word, category, units, arithmetic


def make_rows(tasks, seed):
    rng, rows, asked = random.Random(seed), [], set()
    for family, number, draw, wordings in tasks:
        goal, tries = len(rows) + number, 0
        while len(rows) < goal:
            tries += 1
            assert tries < 100_000, f'{family}: no {number} rows can be made'
            content, answer = draw(rng)
            wording = rng.choice(wordings)
            key = (draw, content, wording if draw in WORDS else '')
            if not content or key in asked:
                continue
            asked.add(key)
            inline = '{}' in wording
            rows.append({'instruction': wording.format(content), 'input': '' if inline else content, 'output': answer,
                         'family': family})
    rng.shuffle(rows)
    return rows


def write_rows(path, rows):
    lines = ',\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'[\n{lines}\n]\n', encoding='utf-8')
    print(f'{path}: {len(rows):,} rows of {len({row["family"] for row in rows})} families')


if __name__ == '__main__':
    folder = Path(__file__).parent
    write_rows(folder / 'demo.json', make_rows(TASKS, SEED))
    write_rows(folder / 'demo_heldback.json', make_rows(HELD_BACK, SEED))
