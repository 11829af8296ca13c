"""
Write the rows of the demo, data/demo.json, and a family of tasks held back from it, data/demo_heldback.json.

    python data/make_demo.py

The rows are made of a small vocabulary, so that a network of a few million weights meets each word often enough to learn
it in minutes. It is tested on sentences and lists that it has not met, and on words asked for in another wording.
"""
import json
import random
from collections import Counter
from pathlib import Path

SEED = 123

# --- the words: nearly all are one token after a space, so that a copied word is one right choice

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
DEEDS = [(*verb.split(), 'the ' + thing) for verb, things in VERBS.items() for thing in things.split()]
PEOPLE = 'farmer teacher doctor singer sailor king queen pilot nurse artist driver judge'.split()
NAMES = 'Anna Peter Tom Mary David Paul'.split()
CITIES = 'Paris London Rome Berlin Dublin Boston'.split()
TRAITS = 'old young tall happy sad rich poor strong'.split()
# what can be said of a thing or a person, so that its opposite can be said too
LOOKS = {
    'big small old new clean dirty': 'car house boat shirt plate chair',
    'open closed': 'door window gate box book letter',
    'full empty': 'box plate boat house',
    'long short': 'letter book story song bridge map',
    'hot cold': 'soup bread fish rice plate',
    'happy sad rich poor strong weak': ' '.join(PEOPLE),
}
SCENES = [('the ' + thing, look) for looks, things in LOOKS.items() for thing in things.split() for look in looks.split()]
SCENES += [(name, mood) for name in NAMES for mood in 'happy sad rich poor strong weak'.split()]
OPPOSITES = {}
for looks in LOOKS:
    words = looks.split()  # in pairs
    OPPOSITES |= dict(zip(words[::2], words[1::2])) | dict(zip(words[1::2], words[::2]))
PLURALS = dict(pair.split(':') for pair in (
    'box:boxes key:keys coin:coins car:cars boat:boats house:houses book:books letter:letters story:stories chair:chairs '
    'horse:horses knife:knives man:men woman:women child:children'
).split())
COLORS = 'red green blue white black'.split()
KINDS = {
    'animal': 'horse dog cat cow lion tiger'.split(),
    'fruit': 'apple banana lemon orange peach'.split(),
    'tool': 'hammer saw drill knife'.split(),
    'vehicle': 'car bus train boat'.split(),
    'instrument': 'piano violin guitar drum'.split(),
}
TYPOS = dict(pair.split(':') for pair in (
    'farmer:famer teacher:techer doctor:docter singer:singar sailor:sailer king:kign queen:qeen pilot:pilott nurse:nurce '
    'artist:artest driver:drivver judge:juge window:windo letter:leter bridge:brige house:huose chair:chiar bread:braed '
    'shirt:shrit plate:plaet'
).split())
UNITS = {('weeks', 'days'): 7, ('hours', 'minutes'): 60, ('meters', 'centimeters'): 100, ('kilograms', 'grams'): 1000}
NUMBERS = 'zero one two three four five six'.split()

# --- the tasks: a function that draws a question and its answer


def start(text):
    return text[0].upper() + text[1:]


def article(word):
    return f'an {word}' if word[0] in 'aeiou' else f'a {word}'


def listed(words):
    return ', '.join(map(str, words))


def of_deed(question, answer):
    def draw(rng):
        who = rng.choice(NAMES) if rng.random() < 0.4 else 'the ' + rng.choice(PEOPLE)
        words = dict(zip(('base', 'now', 'past', 'participle', 'what'), rng.choice(DEEDS)), who=who)
        return start(question.format(**words)), start(answer.format(**words))
    return draw


def of_scene(question, answer):
    def draw(rng):
        what, look = rng.choice(SCENES)
        words = {'what': what, 'look': look, 'opposite': OPPOSITES[look], 'be': rng.choice(['is', 'was'])}
        return start(question.format(**words)), start(answer.format(**words))
    return draw


def of_word(table, answer):
    def draw(rng):
        word = rng.choice(list(table))
        return word, answer.format(word, table[word])
    return draw


def plural_phrase(rng):
    noun = rng.choice(list(PLURALS))
    look = rng.choice(TRAITS if noun in ('man', 'woman', 'child') else COLORS + 'old new big small clean dirty'.split())
    return f'the {look} {noun}', f'the {look} {PLURALS[noun]}'


def category(rng):
    kind = rng.choice(list(KINDS))
    word = article(rng.choice(KINDS[kind]))
    return word, start(f'{word} is {article(kind)}.')


def member(kind):
    def draw(rng):
        kinds = [kind] + rng.sample([other for other in KINDS if other != kind], 2)
        words = [article(rng.choice(KINDS[k])) for k in kinds]
        return listed(rng.sample(words, 3)), start(f'{words[0]} is {article(kind)}.')
    return draw


def sort(things, reverse=False):
    def draw(rng):
        some = rng.sample(things, 3)
        return listed(some), 'Sorted: ' + listed(sorted(some, reverse=reverse))
    return draw


def compare(pick, word):
    def draw(rng):
        a, b = rng.sample(range(1, 16), 2)
        return f'{a} or {b}', f'The {word} number is {pick(a, b)}.'
    return draw


def counting(rng):
    words = rng.sample(list(PLURALS), rng.randint(2, 6))
    return listed(words), f'There are {NUMBERS[len(words)]} words in the list.'


def arithmetic(rng):
    a, b = rng.randint(1, 10), rng.randint(1, 5)
    return rng.choice([(f'{a} + {b}', f'The answer is {a + b}.'), (f'{a + b} - {b}', f'The answer is {a}.')])


def units(rng):
    (big, small), factor = rng.choice(list(UNITS.items()))
    n = rng.randint(2, 9)
    return f'{n} {big} to {small}', f'That is {n * factor} {small}.'


def spelling(rng):
    person, (_, _, past, _, what) = rng.choice(PEOPLE), rng.choice(DEEDS)
    right = f'The {person} {past} {what}.'
    wrong = rng.choice([word for word in (person, what.removeprefix('the ')) if word in TYPOS])
    return right.replace(wrong, TYPOS[wrong]), right


def capitals(rng):
    name, other = rng.sample(NAMES, 2)
    city = rng.choice(CITIES)
    right = rng.choice([f'{name} lives in {city}.', f'{name} and {other} live in {city}.',
                        f'My friend {name} is in {city}.', f'{name} went to {city} with {other}.'])
    return right.lower(), right


def find_adjective(rng):
    trait, (_, _, past, _, what) = rng.choice(TRAITS), rng.choice(DEEDS)
    return f'The {trait} {rng.choice(PEOPLE)} {past} {what}.', f"The adjective is '{trait}'."


# --- their wordings: '{}' stands where the question goes; without it, the question is the input


def into(form):
    return [f'Rewrite the sentence in the {form}.', f'Change the sentence to the {form}.',
            f'Convert the following sentence to the {form}.', f'Put this sentence into the {form}: {{}}']


ASK = ['Rewrite the sentence as a question.', 'Turn the statement into a question.',
       'Change the following sentence into a question.', 'Turn this sentence into a question: {}']
NEGATE = ['Make the sentence negative.', 'Rewrite the sentence in the negative form.', 'Negate the following sentence.',
          'Turn this sentence into its negative: {}']
TASKS = [  # family, rows, what draws them, wordings
    ('past tense', 180, of_deed('{who} {now} {what}.', '{who} {past} {what}.'), into('past tense')),
    ('future tense', 180, of_deed('{who} {now} {what}.', '{who} will {base} {what}.'), into('future tense')),
    ('passive voice', 240, of_deed('{who} {past} {what}.', '{what} was {participle} by {who}.'), into('passive voice')),
    ('question', 120, of_deed('{who} {past} {what}.', 'Did {who} {base} {what}?'), ASK),
    ('question', 100, of_scene('{what} {be} {look}.', '{be} {what} {look}?'), ASK),
    ('negation', 120, of_deed('{who} {past} {what}.', '{who} did not {base} {what}.'), NEGATE),
    ('negation', 100, of_scene('{what} {be} {look}.', '{what} {be} not {look}.'), NEGATE),
    ('opposites', 70, of_word(OPPOSITES, 'The opposite of {} is {}.'), [
        'What is the opposite of {}?', 'What is an antonym of {}?', 'Give the opposite of the word {}.',
        'Name a word that means the opposite of {}.']),
    ('opposites', 260, of_scene('{what} {be} {look}.', '{what} {be} {opposite}.'), [
        'Replace the adjective with its opposite.', 'Rewrite the sentence with the opposite adjective.',
        'Change the adjective to its antonym: {}']),
    ('plural', 50, of_word(PLURALS, 'The plural of {} is {}.'), [
        'What is the plural of {}?', 'What is the plural form of {}?', 'Give the plural of the noun {}.',
        'Write down the plural form of the word {}.']),
    ('plural', 140, plural_phrase, [
        'Rewrite the phrase in the plural.', 'Make the noun plural.', 'Change the noun in this phrase to the plural: {}']),
    ('categories', 80, category, [
        'Is {} an animal, a fruit, a tool, a vehicle or an instrument?', 'What kind of thing is {}?',
        'To which category does {} belong?', 'Classify {} by its category.']),
    *(('categories', 44, member(kind), [
        f'Find the {kind} in the list.', f'Which of the following is {article(kind)}?',
        f'Which of these is {article(kind)}: {{}}?']) for kind in KINDS),
    ('alphabetical order', 260, sort(PEOPLE), [
        'Sort the words in alphabetical order.', 'Arrange the following words alphabetically.',
        'Put the list in alphabetical order.', 'Put these words in alphabetical order: {}']),
    ('sorting', 170, sort(range(1, 11)), [
        'Sort the numbers in ascending order.', 'Arrange the numbers from smallest to largest.',
        'Put these numbers in ascending order: {}']),
    ('sorting', 170, sort(range(1, 11), reverse=True), [
        'Sort the numbers in descending order.', 'Arrange the numbers from largest to smallest.',
        'Put these numbers in descending order: {}']),
    ('counting', 140, counting, [
        'Count the words in the list.', 'How many words are in the list?', 'How many words does the following list have?',
        'Count the words in this list: {}']),
    ('arithmetic', 180, arithmetic, ['What is {}?', 'Calculate {}.', 'Work out {}.', 'Find the result of {}.']),
    ('comparison', 120, compare(max, 'larger'), [
        'Which number is larger, {}?', 'Which of the two numbers is larger?', 'Find the larger number.']),
    ('comparison', 120, compare(min, 'smaller'), [
        'Which number is smaller, {}?', 'Which of the two numbers is smaller?', 'Find the smaller number.']),
    ('units', 110, units, ['Convert {}.', 'Please convert {}.', 'Convert the unit: {}', 'Do this conversion: {}']),
    ('spelling', 220, spelling, [
        'Correct the spelling mistake in the sentence.', 'Fix the misspelled word in the sentence.',
        'Rewrite the sentence with the correct spelling.', 'Correct the spelling of this sentence: {}']),
    ('capital letters', 240, capitals, [
        'Add the missing capital letters.', 'Correct the capitalization of the sentence.',
        'Rewrite the sentence with proper capital letters.', 'Capitalize this sentence correctly: {}']),
    ('finding words', 110, of_deed('{who} {past} {what}.', "The verb is '{past}'."), [
        'Identify the verb in the sentence.', 'Find the verb in the sentence.', 'What is the verb in this sentence? {}']),
    ('finding words', 110, find_adjective, [
        'Identify the adjective in the sentence.', 'Find the adjective in the sentence.',
        'What is the adjective in this sentence? {}']),
]
HELD_BACK = [
    ('active voice', 300, of_deed('{what} was {participle} by {who}.', '{who} {past} {what}.'), into('active voice')),
]


def make_rows(tasks, seed):
    rng, rows = random.Random(seed), []
    for family, number, draw, wordings in tasks:
        times, asked = Counter(), set()
        for _ in range(number):
            # a new question as long as there is one; the few that can be asked of single words come in every wording
            question, answer = min((draw(rng) for _ in range(30)), key=lambda drawn: times[drawn[0]])
            wording = rng.choice([w for w in wordings if (w, question) not in asked])
            times[question] += 1
            asked.add((wording, question))
            rows.append({'instruction': wording.format(question), 'input': '' if '{}' in wording else question,
                         'output': answer, 'family': family})
    rng.shuffle(rows)
    return rows


def write_rows(path, rows):
    lines = ',\n'.join(json.dumps(row) for row in rows)
    path.write_bytes(f'[\n{lines}\n]\n'.encode())
    print(f'{path}: {len(rows):,} rows of {len({row["family"] for row in rows})} families')


if __name__ == '__main__':
    folder = Path(__file__).parent
    write_rows(folder / 'demo.json', make_rows(TASKS, SEED))
    write_rows(folder / 'demo_heldback.json', make_rows(HELD_BACK, SEED))
