"""
Write the rows of the demo, data/demo.json, and a family of tasks held back from it, data/demo_heldback.json.

    python data/make_demo.py

The rows are made of the words in data/words.txt, 3,700 of them, so that what is learned is to find, copy and rearrange words, not
a small vocabulary. Some of the words stand in no training row: a part of the test rows is made of these. The file is in the order
in which config/demo.py cuts it: training rows, test rows, validation rows.
"""
import json
import math
import random
import re
from itertools import accumulate
from pathlib import Path

SEED = 123
TRAIN, TEST, UNSEEN, VAL = 46_000, 600, 300, 300  # rows; the test split holds TEST and UNSEEN

# --- words


def read_words(path):
    """-> {section: list of entries, each a list of words}."""
    sections = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        if line.startswith('# '):
            entries = sections.setdefault(line[2:], [])
        elif sections and line.strip():
            entries.append(line.split())
    return sections


WORDS = read_words(Path(__file__).with_name('words.txt'))
FIXED = set('''the word words list sentence number plural singular opposite synonym question form tense voice past future present passive
active negative first last order animal food person place thing larger smaller answer adjective noun verb kind category is are was were
i you he she they we it have same another written twice'''.split())  # they stand in wordings and answers


def hold_out(sections, share=0.08):
    """-> (what training rows are drawn from, what rows of unseen words are drawn from): no word is in both."""
    rng, unseen = random.Random(SEED), set()
    for name in 'things', 'people', 'animals', 'adjectives', 'transitive':
        # of the verbs the regular ones: their participle stands in the sentence
        able = [entry for entry in sections[name] if name != 'transitive' or entry[2] == entry[3] == entry[0].removesuffix('e') + 'ed']
        # the commonest third stays: visitors use these words
        for entry in rng.sample(able[len(able) // 3:], int(share * len(sections[name]))):
            unseen.update(entry)
    unseen -= FIXED
    listed = {name: [entry for entry in sections[name] if not unseen & {word.lower() for word in entry}] for name in sections}
    others = {name: [entry for entry in sections[name] if unseen >= set(entry)] for name in ('things', 'people', 'animals', 'adjectives', 'transitive')}
    return listed, listed | others


LISTED, UNSEEN_WORDS = hold_out(WORDS)
SPELLED = {entry[0] for entry in WORDS['names behind a space']}
PRONOUNS = [('I', 'me', 'I'), ('he', 'him', 'one'), ('she', 'her', 'one'), ('they', 'them', 'many'), ('we', 'us', 'many')]
OWNERS = 'my your his her our their'.split()
TIMES = ('yesterday|last night|this morning|last week|on Monday|on Friday|in the morning|after school|before dinner|at night|in the summer|'
         'every day|two days ago|at noon').split('|')
WHERE = 'in the garden|in the kitchen|at home|at school|in the park|near the river|in the street|on the table|behind the house|outside'.split('|')
NEAR = 'in on near under behind'.split()
NUMBERS = 'zero one two three four five six seven'.split()
UNITS = {'kilograms': 'grams', 'kilometers': 'meters', 'liters': 'milliliters', 'meters': 'millimeters'}  # of a thousandth

COMMON = list(accumulate(1 / (rank + 15) for rank in range(1000)))  # how often the first words of a list are drawn

# --- parts of sentences


def start(text):
    return text[0].upper() + text[1:]


def common(rng, entries, number=None):
    """-> an entry; those at the head of the list more often, as in life. number: only the first so many."""
    entries = entries[:number]
    return rng.choices(entries, cum_weights=COMMON[:len(entries)])[0]


def article(word):
    return ('an ' if word[0].lower() in 'aeiou' else 'a ') + word


def listed(words):
    return ', '.join(map(str, words))


def phrase(rng, words, noun):
    """A noun's entry -> (phrase, the same, number), like 'the old bridge'."""
    noun, many = noun
    look = common(rng, words['adjectives'])[0] + ' ' if rng.random() < 0.25 else ''
    if rng.random() < 0.15:
        text = rng.choice(['the', 'the', 'some', 'two', 'three', *OWNERS]) + f' {look}{many}'
        return text, text, 'many'
    which = rng.random()
    text = f'the {look}{noun}' if which < 0.6 else article(look + noun) if which < 0.75 else f'{rng.choice(OWNERS)} {look}{noun}'
    return text, text, 'one'


def agent(rng, words):
    """-> (who does it, the same behind a verb, number)."""
    which = rng.random()
    if which < 0.2:
        name = common(rng, words[rng.choice(['names', 'names behind a space'])])[0]
        return name, name, 'one'
    if which < 0.35:
        return rng.choice(PRONOUNS)
    return phrase(rng, words, common(rng, words['people' if which < 0.85 else 'animals']))


def patient(rng, words):
    """-> what it is done to."""
    kind = rng.choices(['things', 'animals', 'people', 'foods'], [7, 1, 1, 1])[0]
    if kind == 'foods':
        text = 'the ' + common(rng, words['foods'])[0]
        return text, text, 'one'
    return phrase(rng, words, common(rng, words[kind]))


def tail(rng, words, share=0.25):
    """-> when or where, with a space before it, or nothing."""
    if rng.random() > share:
        return ''
    by_something = f'{rng.choice(NEAR)} the {common(rng, words["things"])[0]}'
    return ' ' + rng.choice([rng.choice(TIMES), rng.choice(WHERE), 'in ' + rng.choice(words['places'])[0], by_something])


def verb(rng, words, kind='transitive'):
    """-> the forms of a verb: base, now, past, participle."""
    return dict(zip(('base', 'now', 'past', 'participle'), common(rng, words[kind])))


BE_NOW, BE_PAST = {'I': 'am', 'one': 'is', 'many': 'are'}, {'I': 'was', 'one': 'was', 'many': 'were'}


def deed(rng, words):
    """-> a deed's parts, for the tasks below to put together."""
    (who, whom, number), (what, _, count), forms = agent(rng, words), patient(rng, words), verb(rng, words)
    where = tail(rng, words)
    return agreeing(forms, number) | {'who': who, 'whom': whom, 'what': what, 'was': BE_PAST[count], 'tail': where, 'rest': f' {what}{where}'}


def act(rng, words):
    """-> the parts of a deed, or of what someone does to nothing."""
    if rng.random() < 0.75:
        return deed(rng, words)
    who, _, number = agent(rng, words)
    return agreeing(verb(rng, words, 'intransitive'), number) | {'who': who, 'rest': tail(rng, words, 0.7)}


def agreeing(forms, number):
    """-> the forms of a verb, 'now' and 'does' those that go with the number."""
    return forms | ({'does': 'does'} if number == 'one' else {'now': forms['base'], 'does': 'do'})


def matter(rng, words):
    """-> what has no plural, like patient."""
    text = rng.choice(['it', *['the ' + common(rng, words['abstract'])[0]] * 3])
    return text, text, 'one'


def state(rng, words):
    """-> the parts of what something is like."""
    who, _, number = rng.choice([agent, agent, agent, patient, matter])(rng, words)
    be = rng.choice([BE_NOW, BE_PAST])[number]
    return {'who': who, 'be': be, 'look': rng.choice(['', '', 'very ', 'too ']) + common(rng, words['adjectives'])[0], 'tail': tail(rng, words, 0.1)}


# --- the tasks: a function that draws a question and its answer


def of(draw_parts, *forms):
    """Forms of (question, answer), of which one is drawn, and filled with the parts that draw_parts draws."""
    def draw(rng, words):
        parts, (question, answer) = draw_parts(rng, words), rng.choice(forms)
        return start(question.format(**parts)), start(answer.format(**parts))
    return draw


def of_pair(section, answer, both_ways=False):
    def draw(rng, words):
        pair = common(rng, words[section], 70)
        pair = pair[::rng.choice([1, -1])] if both_ways else pair
        return pair[0], answer.format(*pair)
    return draw


def opposite_sentence(rng, words):
    looks = {entry[0] for entry in words['adjectives']}
    pairs = [pair for pair in words['opposites'][:70] if looks & set(pair)]
    parts, (a, b) = state(rng, words), rng.sample(rng.choice(pairs), 2)
    return start(f'{parts["who"]} {parts["be"]} {a}.'), start(f'{parts["who"]} {parts["be"]} {b}.')


def plural(rng, words):
    entry = common(rng, words[rng.choice(['things', 'things', 'people', 'animals'])])
    return entry[0], f'The plural of {entry[0]} is {entry[1]}.'


def plural_phrase(rng, words):
    (noun, many), look = common(rng, words[rng.choice(['things', 'people'])]), common(rng, words['adjectives'])[0]
    return f'the {look} {noun}', f'the {look} {many}'


KINDS = {'animals': 'an animal', 'foods': 'a food', 'people': 'a person', 'places': 'a place', 'things': 'a thing'}


def category(rng, words):
    kind = rng.choice(list(KINDS))
    word = common(rng, words[kind], 25)[0]
    return word, f'The word {word} is the name of {KINDS[kind]}.'


def some_words(rng, words, least, most):
    """-> different words, of one section or of several."""
    names = ['things', 'animals', 'people', 'foods', 'adjectives']
    section, number, some = rng.choice([*names, '']), rng.randint(least, most), []
    while len(some) < number:
        word = common(rng, words[section or rng.choice(names)])[0]
        some += [word] if word not in some else []
    return some


def reverse(rng, words):
    some = some_words(rng, words, 2, 3)
    return listed(some), 'Reversed: ' + listed(some[::-1])


def counting(rng, words):
    some = some_words(rng, words, 2, 7)
    return listed(some), f'There are {NUMBERS[len(some)]} words in the list.'


def pick(place, name):
    def draw(rng, words):
        some = some_words(rng, words, 2, 5)
        return listed(some), f'The {name} word is {some[place]}.'
    return draw


def sort(reverse):
    def draw(rng, words):
        some = rng.sample(range(1, 10), 3)
        return listed(some), 'Sorted: ' + listed(sorted(some, reverse=reverse))
    return draw


def compare(choose, word):
    def draw(rng, words):
        a, b = rng.sample(range(1, 21), 2)
        return f'{a} or {b}', f'The {word} number is {choose(a, b)}.'
    return draw


def units(rng, words):
    (big, small), n = rng.choice(list(UNITS.items())), rng.randint(2, 99)
    return f'{n} {big} to {small}', f'That is {1000 * n:,} {small}.'


def any_sentence(rng, words):
    if rng.random() < 0.3:
        return start('{who} {be} {look}{tail}.'.format(**state(rng, words)))
    return start('{who} {past}{rest}.'.format(**act(rng, words)))


def repeat(rng, words):
    text = any_sentence(rng, words)
    return text, text


def repeated_word(rng, words):
    right = any_sentence(rng, words)
    parts = right.removesuffix('.').split(' ')
    i = rng.randrange(1, len(parts))
    return ' '.join(parts[:i + 1] + parts[i:]) + '.', right


def capitals(rng, words):
    (name,), (other,), (city,) = rng.choice(words['names'][:30]), rng.choice(words['names'][:30]), rng.choice(words['places'][:20])
    right = rng.choice([f'{name} lives in {city}.', f'{name} and {other} live in {city}.', f'My friend {name} is in {city}.'])
    return right.lower(), right


def find(kind):
    def draw(rng, words):
        forms, look, (noun, _), (thing, _) = (rng.choice(words[name]) for name in ('transitive', 'adjectives', 'people', 'things'))
        return f'The {look[0]} {noun} {forms[2]} the {thing}.', f'The {kind} is {dict(verb=forms[2], adjective=look[0])[kind]}.'
    return draw


def use_word(rng, words):
    word = rng.choice(words[rng.choice(['things', 'animals', 'adjectives', 'abstract'])])[0]
    return word, f'My sentence has the word {word}.'


# --- their wordings: '{}' stands where the question goes; without it, the question is the input


def into(form):
    return [f'Rewrite the sentence in the {form}.', f'Change the sentence to the {form}.', f'Rewrite this sentence in the {form}.',
            f'Convert the following sentence to the {form}.', f'Put this sentence into the {form}: {{}}']


ASK = ['Rewrite the sentence as a question.', 'Turn the statement into a question.',
       'Change the following sentence into a question.', 'Turn this sentence into a question: {}']
NEGATE = ['Make the sentence negative.', 'Rewrite the sentence in the negative form.', 'Negate the following sentence.',
          'Turn this sentence into its negative: {}']
TASKS = [  # family, weight, what draws them, wordings, whether the answer is made of the prompt's words
    ('passive voice', 150, of(deed, ('{who} {past} {what}{tail}.', '{what} {was} {participle} by {whom}{tail}.')), into('passive voice'), True),
    ('negation', 90, of(act, ('{who} {past}{rest}.', '{who} did not {base}{rest}.'),
                         ('{who} {now}{rest}.', '{who} {does} not {base}{rest}.')), NEGATE, False),
    ('negation', 50, of(state, ('{who} {be} {look}{tail}.', '{who} {be} not {look}{tail}.')), NEGATE, True),
    ('negation', 30, of(act, ('{who} will {base}{rest}.', '{who} will not {base}{rest}.'),
                        ('{who} can {base}{rest}.', '{who} cannot {base}{rest}.')), NEGATE, True),
    ('question', 100, of(act, ('{who} {past}{rest}.', 'did {who} {base}{rest}?'),
                         ('{who} {now}{rest}.', '{does} {who} {base}{rest}?')), ASK, False),
    ('question', 50, of(state, ('{who} {be} {look}{tail}.', '{be} {who} {look}{tail}?')), ASK, True),
    ('question', 30, of(act, ('{who} will {base}{rest}.', 'will {who} {base}{rest}?'),
                        ('{who} can {base}{rest}.', 'can {who} {base}{rest}?')), ASK, True),
    ('past tense', 60, of(act, ('{who} {now}{rest}.', '{who} {past}{rest}.')), into('past tense'), False),
    ('future tense', 40, of(act, ('{who} {now}{rest}.', '{who} will {base}{rest}.')), into('future tense'), False),
    ('opposites', 120, of_pair('opposites', 'The opposite of {} is {}.', both_ways=True), [
        'What is the opposite of {}?', 'What is an antonym of {}?', 'Give the opposite of the word {}.',
        'Name a word that means the opposite of {}.', 'Tell me the opposite of {}.', 'Find an antonym for {}.',
        'Which word is the opposite of {}?', 'Provide an antonym for {}.', 'Write the opposite of {}.',
        'Give an antonym for the word {}.'], False),
    ('opposites', 60, opposite_sentence, [
        'Replace the adjective with its opposite.', 'Rewrite the sentence with the opposite adjective.',
        'Change the adjective to its antonym: {}'], False),
    ('synonyms', 24, of_pair('synonyms', 'A synonym of {} is {}.'), [
        'What is a synonym of {}?', 'Provide a synonym for {}.', 'Give a synonym of the word {}.',
        'Name another word for {}.', 'What is another word for {}?', 'Find a synonym for the word {}.',
        'Tell me a synonym of {}.', 'Which word means the same as {}?', 'Suggest a synonym for {}.',
        'Write a word that means the same as {}.'], False),
    ('plural', 130, plural, [
        'What is the plural of {}?', 'What is the plural form of {}?', 'Give the plural of the noun {}.',
        'Write down the plural form of the word {}.'], False),
    ('plural', 30, plural_phrase, [
        'Rewrite the phrase in the plural.', 'Make the noun plural.', 'Change the noun in this phrase to the plural: {}'], False),
    ('categories', 40, category, [
        'Is {} an animal, a food, a person, a place or a thing?', 'What kind of thing is {}?', 'To which category does {} belong?',
        'Classify {} by its category.', 'Classify the word {}.', 'What is the category of {}?', 'Name the category of the word {}.',
        'Tell me what kind of thing {} is.', 'Which category fits {}?', 'Is {} a person, an animal, a place, a food or a thing?'], False),
    ('reversing', 60, reverse, [
        'Reverse the order of these words: {}', 'Write this list in the reverse order: {}', 'Put these words in the reverse order: {}'], True),
    ('sorting', 40, sort(False), [
        'Sort the numbers in ascending order.', 'Arrange the numbers from smallest to largest.',
        'Put these numbers in ascending order: {}'], False),
    ('sorting', 40, sort(True), [
        'Sort the numbers in descending order.', 'Arrange the numbers from largest to smallest.',
        'Put these numbers in descending order: {}'], False),
    ('counting', 50, counting, [
        'Count the words in the list.', 'How many words are in the list?', 'How many words does the following list have?',
        'Count the words in this list: {}'], True),
    ('picking', 35, pick(0, 'first'), ['What is the first word of this list? {}', 'Pick the first word: {}', 'Name the first of these words: {}'], True),
    ('picking', 35, pick(-1, 'last'), ['What is the last word of the list?', 'Pick the last word.', 'Name the last of these words: {}'], True),
    ('comparison', 16, compare(max, 'larger'), [
        'Which number is larger, {}?', 'Which of the two numbers is larger?', 'Find the larger number.'], False),
    ('comparison', 16, compare(min, 'smaller'), [
        'Which number is smaller, {}?', 'Which of the two numbers is smaller?', 'Find the smaller number.'], False),
    ('units', 14, units, ['Convert {}.', 'Please convert {}.', 'Convert the unit: {}', 'Do this conversion: {}', 'Can you convert {}?', 'Change the unit: {}',
                           'I need to convert {}.', 'Help me to convert {}.'], False),
    ('repeated words', 35, repeated_word, [
        'Remove the word that is written twice.', 'Correct the sentence, in which a word is repeated.',
        'Fix the repeated word in this sentence: {}'], True),
    ('capital letters', 20, capitals, [
        'Add the missing capital letters.', 'Correct the capitalization of the sentence.',
        'Rewrite the sentence with proper capital letters.', 'Capitalize this sentence correctly: {}'], False),
    ('finding words', 20, find('verb'), [
        'Identify the verb in the sentence.', 'Find the verb in the sentence.', 'What is the verb in this sentence? {}'], True),
    ('finding words', 20, find('adjective'), [
        'Identify the adjective in the sentence.', 'Find the adjective in the sentence.', 'What is the adjective in this sentence? {}'], True),
    ('repeating', 30, repeat, ['Repeat the sentence.', 'Write the sentence again.', 'Say this again: {}'], True),
    ('using a word', 25, use_word, [
        'Generate a sentence using the word {}.', 'Write a sentence that uses the word {}.', 'Make a sentence with the word {}.'], True),
]
HELD_BACK = [
    ('active voice', 1, of(deed, ('{what} {was} {participle} by {whom}{tail}.', '{who} {past} {what}{tail}.')), into('active voice'), True),
]


def normal(row):
    """What prepare.py, too, takes for the same prompt."""
    return re.findall(r'\w+', f'{row["instruction"]} {row["input"]}'.lower())


def is_spelled(text):
    """Whether it starts with a name that GPT-2's vocabulary spells in pieces there."""
    return re.match(r"\w*", text)[0] in SPELLED


def make_rows(tasks, number, words, rng, asked):
    """-> rows, in the tasks' shares. No prompt is in `asked`, to which theirs are added."""
    rows = []
    for family, weight, draw, wordings, _ in tasks:
        share = math.ceil(number * weight / sum(task[1] for task in tasks))  # a few more than number in all
        enough = len(rows) + share
        for _ in range(40 * share):  # of some tasks there are only so many rows
            if len(rows) == enough:
                break
            wording, (question, answer) = rng.choice(wordings), draw(rng, words)
            row = {'instruction': wording.format(question), 'input': '' if '{}' in wording else question, 'output': answer, 'family': family}
            # a name that starts the input is of other tokens than behind a space: it is copied to the start of the answer, or not at all
            if is_spelled(row['input']) != is_spelled(answer):
                continue
            if (key := tuple(normal(row))) not in asked:
                asked.add(key)
                rows.append(row)
    rng.shuffle(rows)
    return rows


def words_in(sections):
    return {word.lower() for entries in sections.values() for entry in entries for word in entry}


def make_all():
    """-> ({file: rows}). The rows of demo.json are in the order train, test, val; the shares of config/demo.py cut them there."""
    rng, asked = random.Random(SEED), set()
    test = [row | {'source': 'listed words'} for row in make_rows(TASKS, TEST, LISTED, rng, asked)]
    held_out = words_in(WORDS) - words_in(LISTED) - FIXED
    unseen = make_rows([task for task in TASKS if task[4]], 2 * UNSEEN, UNSEEN_WORDS, rng, asked)
    unseen = [row | {'source': 'unseen words'} for row in unseen if held_out & set(normal(row))]
    val, train = make_rows(TASKS, VAL, LISTED, rng, asked), make_rows(TASKS, TRAIN + 6_000, LISTED, rng, asked)  # of some families there are fewer
    test = test[:TEST] + unseen[:UNSEEN]
    rng.shuffle(test)
    return {'demo.json': train[:TRAIN] + test + val[:VAL], 'demo_heldback.json': make_rows(HELD_BACK, 300, LISTED, rng, asked)}


def write_rows(path, rows):
    lines = ',\n'.join(json.dumps(row) for row in rows)
    path.write_bytes(f'[\n{lines}\n]\n'.encode())
    print(f'{path}: {len(rows):,} rows of {len({row["family"] for row in rows})} families')


if __name__ == '__main__':
    for name, rows in make_all().items():
        write_rows(Path(__file__).with_name(name), rows)
