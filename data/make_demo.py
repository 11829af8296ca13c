"""
Write what the demo learns from: data/demo.json, a family of tasks held back from it, data/demo_heldback.json, and the model it starts from,
data/demo_start.pth.

    python data/make_demo.py

The rows are made of the words in data/words.txt, so that what is learned is to find, copy and rearrange words, not a small vocabulary. Some
of the words stand in no training row: a part of the test rows is made of these. Others, called more words there, stand in training rows
alone: the more words there are, the less helps it to learn them by heart. The wordings of a task are many, some of them with a typing
error or in odd case, as people type. The file is in the order in which config/demo.py cuts it: training, test and validation rows.
"""
import json
import math
import random
import re
from itertools import accumulate
from pathlib import Path

from start_model import get_tokenizer, write_start_model

SEED = 123
TRAIN, TEST, UNSEEN, VAL = 80_000, 600, 300, 300  # rows; the test split holds TEST and UNSEEN

# ----------------------------------------------------------------------------------------------------------------------------------------
# words


def read_words(path):
    """{section: list of entries, each a list of words}."""
    sections = {}
    entries = None
    for line in path.read_text(encoding='utf-8').splitlines():
        if line.startswith('# '):
            entries = sections.setdefault(line[2:], [])
        elif entries is not None and line.strip():
            entries.append(line.split())
    return sections


WORDS = read_words(Path(__file__).with_name('words.txt'))
# they stand in wordings and answers
FIXED = set('''the word words list sentence number plural singular opposite synonym question form tense voice past future present passive
active negative first last order animal food person place thing larger smaller answer adjective noun verb kind category is are was were
i you he she they we it have same another written twice'''.split())


def hold_out(sections, share=0.08):
    """(what training rows are drawn from, what rows of unseen words are drawn from): no word is in both."""
    rng = random.Random(SEED)
    unseen = set()
    for name in 'things', 'people', 'animals', 'adjectives', 'transitive':
        entries = sections[name]
        if name == 'transitive':  # the regular ones: their participle stands in the sentence
            entries = [entry for entry in entries if entry[2] == entry[3] == entry[0].removesuffix('e') + 'ed']
        # the commonest third stays: visitors use these words
        for entry in rng.sample(entries[len(entries) // 3:], int(share * len(sections[name]))):
            unseen.update(entry)
    unseen -= FIXED
    listed = {}
    for name, entries in sections.items():
        if not name.startswith('more'):
            listed[name] = [entry for entry in entries if not unseen & {word.lower() for word in entry}]
    others = {name: [entry for entry in sections[name] if unseen >= set(entry)]
              for name in ('things', 'people', 'animals', 'adjectives', 'transitive')}
    return listed, listed | others


LISTED, UNSEEN_WORDS = hold_out(WORDS)
TRAINED = LISTED | {name: entries for name, entries in WORDS.items() if name.startswith('more')}
# which of the more words stand for those of a section, and how often
MORE_OF = {'things': 'more things', 'people': 'more things', 'animals': 'more things', 'adjectives': 'more adjectives',
           'transitive': 'more transitive'}
MORE_SHARE = 0.35
COMMON = list(accumulate(1 / (rank + 15) for rank in range(1000)))  # how often the first words of a list are drawn


def common(rng, entries):
    """An entry; half of the time one of those at the head of the list, as in life, else any."""
    if rng.random() < 0.5:
        return rng.choice(entries)
    return rng.choices(entries, cum_weights=COMMON[:len(entries)])[0]


def any_of(rng, words, section):
    """An entry of the section; in training rows now and then one of the more words."""
    more = words.get(MORE_OF.get(section))
    return rng.choice(more) if more and rng.random() < MORE_SHARE else common(rng, words[section])


def is_one_token(word):
    return len(get_tokenizer().encode_ordinary(' ' + word)) == 1


def choose(rng, text):
    """A text in which one of each (this|that) is taken."""
    while '(' in text:
        text = re.sub(r'\(([^()]*)\)', lambda match: rng.choice(match[1].split('|')), text, count=1)
    return ' '.join(text.split())


def start(text):
    return text[0].upper() + text[1:]


# ----------------------------------------------------------------------------------------------------------------------------------------
# parts of sentences

PRONOUNS = [('I', 'me', 'I'), ('he', 'him', 'one'), ('she', 'her', 'one'), ('they', 'them', 'many'), ('we', 'us', 'many')]
OWNERS = 'my your his her our their'.split()
TIMES = ('yesterday|last night|this morning|last week|on Monday|on Friday|in the morning|after school|before dinner|at night|in the summer|'
         'every day|two days ago|at noon|early in the morning|at the end of the week').split('|')
WHERE = ('in the garden|in the kitchen|at home|at school|in the park|near the river|in the street|on the table|behind the house|outside|'
         'in front of the old house|at the corner of the street').split('|')
NEAR = 'in on near under behind'.split()
BE_NOW = {'I': 'am', 'one': 'is', 'many': 'are'}
BE_PAST = {'I': 'was', 'one': 'was', 'many': 'were'}


def article(word):
    return ('an ' if word[0].lower() in 'aeiou' else 'a ') + word


def listed(words):
    return ', '.join(map(str, words))


def noun_phrase(rng, words, noun):
    """A noun's entry -> (phrase, the same, number), like 'the old bridge of the town'."""
    singular, plural = noun
    looks = [any_of(rng, words, 'adjectives')[0] for _ in range(rng.choices([0, 1, 2], [72, 23, 5])[0])]
    look = ' '.join([*looks, ''])
    more = ''
    if rng.random() < 0.1:
        more = f' {rng.choice(["of", "with", "from"])} {rng.choice(["the", "my", "their"])} {any_of(rng, words, "things")[0]}'
    if rng.random() < 0.15 and is_one_token(plural):
        text = rng.choice(['the', 'the', 'the', 'some', 'two', 'three', rng.choice(OWNERS)]) + f' {look}{plural}{more}'
        return text, text, 'many'
    which = rng.random()
    text = rng.choice(OWNERS) + f' {look}{singular}'
    if which < 0.6:
        text = f'the {look}{singular}'
    elif which < 0.75:
        text = article(look + singular)
    return text + more, text + more, 'one'


def agent(rng, words):
    """(who does it, the same behind a verb, number)."""
    which = rng.random()
    if which < 0.28:
        name = common(rng, words[rng.choice(['names', 'names behind a space', 'names in pieces'])])[0]
        return name, name, 'one'
    if which < 0.4:
        return rng.choice(PRONOUNS)
    return noun_phrase(rng, words, any_of(rng, words, 'people' if which < 0.85 else 'animals'))


def patient(rng, words):
    """(what it is done to, the same, number)."""
    kind = rng.choices(['things', 'animals', 'people', 'foods'], [7, 1, 1, 1])[0]
    if kind == 'foods':
        text = 'the ' + common(rng, words['foods'])[0]
        return text, text, 'one'
    return noun_phrase(rng, words, any_of(rng, words, kind))


def tail(rng, words, share=0.25):
    """When, where or both, with a space before it, or nothing."""
    if rng.random() > share:
        return ''
    by_something = f'{rng.choice(NEAR)} the {any_of(rng, words, "things")[0]}'
    place = rng.choice([rng.choice(WHERE), 'in ' + rng.choice(words['places'])[0], by_something])
    when = rng.choice(TIMES)
    return ' ' + rng.choice([place, when, f'{place} {when}'])


def verb(rng, words, number, kind='transitive'):
    """The forms of a verb: base, past, participle, and those that go with the number: now, do."""
    base, third, past, participle, _ = any_of(rng, words, kind)
    return {'base': base, 'now': third if number == 'one' else base, 'past': past, 'participle': participle,
            'do': 'does' if number == 'one' else 'do'}


def deed(rng, words):
    """A deed's parts, for the tasks below to put together."""
    who, whom, number = agent(rng, words)
    what, _, count = patient(rng, words)
    where = tail(rng, words)
    parts = {'who': who, 'whom': whom, 'what': what, 'was': BE_PAST[count], 'is': BE_NOW[count], 'tail': where, 'rest': f' {what}{where}'}
    return parts | verb(rng, words, number)


def act(rng, words):
    """The parts of a deed, or of what someone does to nothing."""
    if rng.random() < 0.75:
        return deed(rng, words)
    who, _, number = agent(rng, words)
    return {'who': who, 'rest': tail(rng, words, 0.7)} | verb(rng, words, number, 'intransitive')


def matter(rng, words):
    """What has no plural, like patient."""
    text = rng.choice(['it', *['the ' + common(rng, words['abstract'])[0]] * 3])
    return text, text, 'one'


def state(rng, words):
    """The parts of what something is like."""
    who, _, number = rng.choice([agent, agent, agent, patient, matter])(rng, words)
    return {'who': who, 'be': rng.choice([BE_NOW, BE_PAST])[number], 'tail': tail(rng, words, 0.1),
            'look': rng.choice(['', '', 'very ', 'too ']) + any_of(rng, words, 'adjectives')[0]}


# ----------------------------------------------------------------------------------------------------------------------------------------
# the tasks: a function that draws a question and its answer


def of(draw_parts, *forms):
    """Forms of (question, answer), of which one is drawn, and filled with the parts that draw_parts draws."""
    def draw(rng, words):
        parts = draw_parts(rng, words)
        question, answer = rng.choice(forms)
        return start(question.format(**parts)), start(answer.format(**parts))
    return draw


def of_pair(section, answer, both_ways=False):
    def draw(rng, words):
        pair = common(rng, words[section])
        if both_ways and rng.random() < 0.5:
            pair = pair[::-1]
        return pair[0], answer.format(*pair)
    return draw


def opposite_sentence(rng, words):
    looks = {entry[0] for entry in words['adjectives']}
    pairs = [pair for pair in words['opposites'] if looks & set(pair)]
    parts = state(rng, words)
    a, b = rng.sample(rng.choice(pairs), 2)
    if rng.random() < 0.1:
        return start(f'{parts["be"]} {parts["who"]} {a}?'), start(f'{parts["be"]} {parts["who"]} {b}?')
    return start(f'{parts["who"]} {parts["be"]} {a}.'), start(f'{parts["who"]} {parts["be"]} {b}.')


def noun_with_plural(rng, words, sections):
    """(singular, plural), none that GPT-2's vocabulary spells in pieces: each of these would have to be learned by heart."""
    while True:
        singular, several = common(rng, words[rng.choice(sections)])
        if is_one_token(several):
            return singular, several


def plural(rng, words):
    singular, several = noun_with_plural(rng, words, ['things', 'things', 'people', 'animals'])
    return singular, f'The plural of {singular} is {several}.'


def plural_phrase(rng, words):
    singular, several = noun_with_plural(rng, words, ['things', 'people'])
    look = common(rng, words['adjectives'])[0]
    return f'the {look} {singular}', f'the {look} {several}'


KINDS = {'animals': 'an animal', 'foods': 'a food', 'people': 'a person', 'places': 'a place', 'things': 'a thing'}


def category(rng, words):
    kind = rng.choice(list(KINDS))
    word = common(rng, words[kind])[0]
    return word, f'The word {word} is the name of {KINDS[kind]}.'


def some_words(rng, words, least, most):
    """Different words, of one section or of several."""
    names = ['things', 'animals', 'people', 'foods', 'adjectives']
    section = rng.choice([*names, ''])
    number = rng.randint(least, most)
    some = []
    while len(some) < number:
        word = any_of(rng, words, section or rng.choice(names))[0]
        if word not in some:
            some.append(word)
    return some


NUMBERS = 'zero one two three four five six seven'.split()


def counting(rng, words):
    some = some_words(rng, words, 2, 7)
    return listed(some), f'There are {NUMBERS[len(some)]} words in the list.'


def pick(place, name):
    def draw(rng, words):
        some = some_words(rng, words, 2, 7)
        return listed(some), f'The {name} word is {some[place]}.'
    return draw


UNITS = {'kilograms': 'grams', 'kilometers': 'meters', 'liters': 'milliliters', 'meters': 'millimeters'}  # of a thousandth


def units(rng, words):
    big, small = rng.choice(list(UNITS.items()))
    n = rng.randint(2, 99)
    return f'{n} {big} to {small}', f'That is {1000 * n:,} {small}.'


def any_sentence(rng, words):
    if rng.random() < 0.3:
        return start('{who} {be} {look}{tail}.'.format(**state(rng, words)))
    return start('{who} {past}{rest}.'.format(**act(rng, words)))


def repeat(rng, words):
    text = any_sentence(rng, words)
    return text, text


def capitals(rng, words):
    name, other = [rng.choice(words['names'][:30])[0] for _ in range(2)]
    city = rng.choice(words['places'][:20])[0]
    right = rng.choice([f'{name} lives in {city}.', f'{name} and {other} live in {city}.', f'My friend {name} is in {city}.'])
    return right.lower(), right


def find(kind):
    def draw(rng, words):
        past = rng.choice(words['transitive'])[2]
        look = rng.choice(words['adjectives'])[0]
        noun = rng.choice(words['people'])[0]
        thing = rng.choice(words['things'])[0]
        return f'The {look} {noun} {past} the {thing}.', f'The {kind} is {past if kind == "verb" else look}.'
    return draw


def use_word(rng, words):
    word = rng.choice(words[rng.choice(['things', 'animals', 'adjectives', 'abstract'])])[0]
    return word, f'My sentence has the word {word}.'


ELSE = ('I only know these tasks: passive voice, negation, questions, tenses, opposites, synonyms, plurals, categories, lists and units.')
TALK = ['(Hello|Hi|Hey|Good morning|Good evening|Hello there|Hi there)( !|!|.|)', 'How are you(| today| doing)?', '(Thank you|Thanks)( a lot|)(!|.|)',
        '(Who|What) are you?', 'What can you do( for me|)?', '(Help|Help me)(!|.|)', 'What is your name?', 'Are you (a robot|human|there|real)?',
        'Tell me (a joke|a story|something|about yourself)(.|)', 'What (time|day) is it?', 'Do you (know|like|remember) (me|{name}|{abstract})?']
OPEN = ['Who is {name}?', 'Where is {place}?', 'What is (the capital|the population|the history) of {place}?', 'Why is the {thing} {look}?',
        'What is (a|the) {thing}?', 'Explain {abstract}( to me|).', 'How (does|do) {thing}s work?', 'Write (a poem|an essay|a letter|a story) about {abstract}.',
        'Translate the word {thing} (into|to) (French|German|Spanish).', 'How (old|tall|big) is {name}?', 'When (was|did) {name} (born|die)?',
        'Summarize (the|this) {thing}.', 'Describe the {look} {thing}.', 'Give me (advice|ideas|tips) about {abstract}.', 'How do I (make|fix|cook|find) {food}?',
        'What do you think (of|about) {abstract}?', 'Who (wrote|made|found) the {thing}?', 'Recommend a (book|film|song) about {abstract}.',
        'Is {place} (far|near|nice|large)?', 'What should I do (today|tomorrow|in {place})?', 'Tell me about {abstract}.', 'Solve this: {abstract}']


def something_else(rng, words):
    """What is none of the tasks."""
    text = choose(rng, rng.choice(TALK if rng.random() < 0.3 else OPEN))
    filled = text.format(
        name=common(rng, words[rng.choice(['names', 'names in pieces'])])[0], place=rng.choice(words['places'])[0],
        thing=common(rng, words['things'])[0], look=common(rng, words['adjectives'])[0],
        abstract=common(rng, words['abstract'])[0], food=common(rng, words['foods'])[0])
    return filled, ELSE


# ----------------------------------------------------------------------------------------------------------------------------------------
# their wordings: '{}' stands where the question goes; without it, the question is the input

REWRITE = '(Rewrite|Change|Convert|Turn|Put|Transform) (the|this|the following) (sentence|statement|text)'


def into(form, short):
    """Wordings for a change of the sentence into a form."""
    return [f'{REWRITE} (in|into|to) the {form}.', f'{REWRITE} (in|into|to) the {form}.', f'Rewrite (it|this) (in|using) the {form}.',
            f'Use the {form}( for this sentence|).', f'(Make|Turn|Put) (this|it|the sentence) (into |in |){short}.',
            f'(Make|Turn|Put|Change|Convert) (this|it|this sentence) (to|into|in) (the |){short}: {{}}',
            f'(Change|Convert|Rewrite|Transform) (to|into|in) (the |){form}: {{}}', f'Make (this|it) {short}: {{}}', f'(To |In |In the |){form}: {{}}',
            f'(To |In |In the |){short}: {{}}', f'What is (this sentence|this) in the {form}? {{}}', f'Give the {short}( form|) of (this|this sentence): {{}}',
            f'Say (this|it) in the {form}: {{}}', f'Write (this|it) in the {form}: {{}}']


ASK = [f'{REWRITE} (as|into) a question.', '(Make|Form) a question( of this| from this| out of it| from the sentence|).', 'Make (it|this) a question: {}',
       'Turn (this|it|this sentence|the statement) into a question: {}', '(To a |Into a |As a |)question: {}', 'Ask (this|it) as a question: {}',
       'Question form(:| of this:) {}', 'What is the question( for this|)? {}', 'Write (it|this) as a question: {}', 'Change (it|this) to a question: {}']
NEGATE = [f'{REWRITE} (in|into|to) the negative( form|).', '(Make|Turn) (the|this|the following) (sentence|statement) (negative|into a negative).',
          'Negate (the|this|the following) (sentence|statement).', 'Negate( it| this|): {}', 'Make (this|it) negative: {}',
          '(Negative|Negation|Negated|In the negative|Negative form): {}', 'Say (that it is not so|the negative): {}', 'Add not to (the|this) sentence.',
          'Turn (this|it) into its negative: {}', 'What is the negative( form|) of this( sentence|)? {}', 'Write the negation( of this|): {}']
OPPOSITE = ['What is (the|an) (opposite|antonym|contrary) of( the word|) {}?', '(Give|Tell|Show) (me |)(the|an) (opposite|antonym) (of|for)( the word|) {}(.|)',
            'Name a word that means the opposite of {}.', 'Find an antonym (for|of) {}.', 'Which word is the opposite of {}?', '(Say|Write) the opposite of {}(.|)',
            '(Opposite|Antonym) of {}(?|)', '(Opposite|Antonym): {}', 'What (word |)means the opposite of {}?', 'the opposite of {}(?|)']
SYNONYM = ['What is (a|another) (synonym|word) (of|for)( the word|) {}?', '(Give|Provide|Suggest|Find)( me|) a synonym (for|of)( the word|) {}(.|)',
           'Name another word for {}.', 'Which word means the same as {}?', 'Write a word that means the same as {}.', '(Synonym|Another word) (of|for) {}(?|)',
           'Synonym: {}', 'Tell me a synonym of {}.', 'What means the same as {}?']
PLURAL = ['What is the plural( form|) of( the word|) {}?', '(Give|Write down|Write|Tell me|Name) the plural( form|) of( the noun| the word|) {}(.|)',
          'Plural of {}(?|)', 'Plural: {}', 'How do you write {} in the plural?', 'What do you call more than one {}?',
          'Make {} plural(.|)', 'the plural of {}(?|)']
CATEGORY = ['Is {} (an animal, a food, a person, a place or a thing|a person, an animal, a place, a food or a thing)?', 'What kind of thing is {}?',
            '(To which|Which|What) category does {} belong( to|)?', 'Classify( the word|) {}( by its category|).', '(What is|Name|Give) the category of( the word|) {}(.|)',
            'Tell me what kind of thing {} is.', 'Which category fits {}?', 'Category of {}(?|)', 'Category: {}', 'What is {}: an animal, a food, a person, a place or a thing?',
            'Classify: {}']
TASKS = [  # family, weight, what draws them, wordings, whether the answer is made of the prompt's words
    ('passive voice', 150, of(deed, ('{who} {past} {what}{tail}.', '{what} {was} {participle} by {whom}{tail}.')), into('passive voice', 'passive'), True),
    ('passive voice', 60, of(deed, ('{who} {now} {what}{tail}.', '{what} {is} {participle} by {whom}{tail}.'),
                             ('{who} will {base} {what}{tail}.', '{what} will be {participle} by {whom}{tail}.')), into('passive voice', 'passive'), False),
    ('passive voice', 14, of(deed, ('did {who} {base} {what}{tail}?', '{was} {what} {participle} by {whom}{tail}?'),
                             ('{do} {who} {base} {what}{tail}?', '{is} {what} {participle} by {whom}{tail}?')), into('passive voice', 'passive'), False),
    ('negation', 90, of(act, ('{who} {past}{rest}.', '{who} did not {base}{rest}.'),
                         ('{who} {now}{rest}.', '{who} {do} not {base}{rest}.')), NEGATE, False),
    ('negation', 50, of(state, ('{who} {be} {look}{tail}.', '{who} {be} not {look}{tail}.')), NEGATE, True),
    ('negation', 30, of(act, ('{who} will {base}{rest}.', '{who} will not {base}{rest}.'),
                        ('{who} can {base}{rest}.', '{who} cannot {base}{rest}.')), NEGATE, True),
    ('negation', 14, of(act, ('did {who} {base}{rest}?', 'did {who} not {base}{rest}?'), ('{do} {who} {base}{rest}?', '{do} {who} not {base}{rest}?')),
     NEGATE, True),
    ('negation', 8, of(state, ('{be} {who} {look}{tail}?', '{be} {who} not {look}{tail}?')), NEGATE, True),
    ('question', 100, of(act, ('{who} {past}{rest}.', 'did {who} {base}{rest}?'),
                         ('{who} {now}{rest}.', '{do} {who} {base}{rest}?')), ASK, False),
    ('question', 50, of(state, ('{who} {be} {look}{tail}.', '{be} {who} {look}{tail}?')), ASK, True),
    ('question', 30, of(act, ('{who} will {base}{rest}.', 'will {who} {base}{rest}?'),
                        ('{who} can {base}{rest}.', 'can {who} {base}{rest}?')), ASK, True),
    ('past tense', 70, of(act, ('{who} {now}{rest}.', '{who} {past}{rest}.')), into('past tense', 'past'), False),
    ('past tense', 10, of(act, ('{do} {who} {base}{rest}?', 'did {who} {base}{rest}?')), into('past tense', 'past'), False),
    ('future tense', 45, of(act, ('{who} {now}{rest}.', '{who} will {base}{rest}.'), ('{who} {past}{rest}.', '{who} will {base}{rest}.')),
     into('future tense', 'future'), False),
    ('opposites', 150, of_pair('opposites', 'The opposite of {} is {}.', both_ways=True), OPPOSITE, False),
    ('opposites', 60, opposite_sentence, [
        'Replace the adjective (with|by) its opposite.', f'{REWRITE} (with|using) the opposite adjective.', 'Change the adjective to its (antonym|opposite): {}',
        'Use the opposite adjective( here|): {}', 'Swap the adjective for its opposite.'], False),
    ('synonyms', 60, of_pair('synonyms', 'A synonym of {} is {}.'), SYNONYM, False),
    ('plural', 160, plural, PLURAL, False),
    ('plural', 30, plural_phrase, [
        '(Rewrite|Put|Change) the phrase (in|into|to) the plural.', 'Make the (noun|phrase) plural.', 'Change the noun in this phrase to the plural: {}',
        'In the plural: {}', 'Make this plural: {}'], False),
    ('categories', 110, category, CATEGORY, False),
    ('counting', 60, counting, [
        'Count the words( in the list| in this list|).', 'How many words (are|stand) in (the|this) list?', 'How many words does (the following|this) list have?',
        'Count (the words in this list|these words|the words|these): {}', 'How many( words|)? {}', 'Number of words: {}'], True),
    ('picking', 45, pick(0, 'first'), ['What is the first word( of this list| of the list|)? {}', '(Pick|Take|Choose|Name|Give) the first( word| one|): {}',
                                       'Name the first of these words: {}', 'What is the first word of the list?', 'First word: {}', 'Which word comes first? {}'], True),
    ('picking', 45, pick(-1, 'last'), ['What is the last word( of this list| of the list|)?', '(Pick|Take|Choose|Name|Give) the last( word| one|): {}',
                                       'Name the last of these words: {}', 'What is the last word? {}', 'Last word: {}', 'Which word comes last? {}'], True),
    ('units', 20, units, ['(Convert|Change|Please convert) {}.', '(Convert|Change) the unit: {}', 'Do this conversion: {}', 'Can you convert {}?',
                          'I need to convert {}.', 'Help me to convert {}.', 'Convert: {}', 'How much is {}?'], False),
    ('capital letters', 20, capitals, [
        'Add the missing capital letters.', '(Correct|Fix) the capitalization( of the sentence|).', 'Rewrite the sentence with proper capital letters.',
        'Capitalize (this sentence|this|it) correctly: {}', 'Fix the capitals: {}'], False),
    ('finding words', 20, find('verb'), [
        '(Identify|Find|Name) the verb( in the sentence|).', 'What is the verb( in this sentence| here|)? {}', 'Which word is the verb? {}', 'Verb: {}'], True),
    ('finding words', 20, find('adjective'), [
        '(Identify|Find|Name) the adjective( in the sentence|).', 'What is the adjective( in this sentence| here|)? {}', 'Which word is the adjective? {}',
        'Adjective: {}'], True),
    ('repeating', 35, repeat, ['Repeat the sentence.', 'Write the sentence again.', 'Say (this|it) again: {}', 'Repeat( this| after me|): {}', 'Copy (this|the sentence): {}'],
     True),
    ('using a word', 25, use_word, [
        '(Generate|Make|Write|Form) a sentence (using|with) the word {}.', 'Write a sentence that uses the word {}.', 'Use {} in a sentence(.|)',
        'A sentence with {}(.|)'], True),
    ('something else', 90, something_else, ['{}'], False),
]
HELD_BACK = [
    ('active voice', 1, of(deed, ('{what} {was} {participle} by {whom}{tail}.', '{who} {past} {what}{tail}.')), into('active voice', 'active'), True),
]

# ----------------------------------------------------------------------------------------------------------------------------------------
# rows, with the habits of those who type


def mistype(rng, text):
    """The text with one typing error in a word of four letters or more."""
    words = text.split(' ')
    long = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if not long:
        return text
    i = rng.choice(long)
    word = words[i]
    at = rng.randrange(1, len(word) - 1)
    words[i] = rng.choice([word[:at] + word[at + 1:],  # a letter is missing
                           word[:at] + word[at] + word[at:],  # is there twice
                           word[:at] + word[at + 1] + word[at] + word[at + 2:]])  # two have changed places
    return ' '.join(words)


def make_row(rng, family, wording, question, answer):
    """A row, in one of the ways in which people put a task and its sentence together, in usual or odd case."""
    wording = choose(rng, wording)
    if rng.random() < 0.06 and wording[0].isupper():
        wording = rng.choice(['Please ', 'Can you ', 'Could you ', 'I want you to ']) + wording[0].lower() + wording[1:]
    is_sentence = question.endswith(('.', '?')) and ' ' in question
    which = rng.random()
    if is_sentence and which < 0.04:  # without its full stop; the answer has its own
        question = question[:-1]
    elif is_sentence and which < 0.10:
        question = question.lower()
    which = rng.random()
    if which < 0.10 and family != 'something else':
        wording = mistype(rng, wording)
    elif which < 0.18:
        wording = wording.lower()
    elif which < 0.20:
        wording = wording.upper()
    elif which < 0.26:
        wording = wording.rstrip('.?')

    # all in one line, or the sentence as the input
    which = rng.random()
    if '{}' in wording:
        text = f'"{question}"' if is_sentence and which < 0.08 else question
        return {'instruction': wording.replace('{}', text), 'input': '', 'output': answer, 'family': family}
    if which < 0.10:
        return {'instruction': f'{wording.rstrip(".")}: {question}', 'input': '', 'output': answer, 'family': family}
    if which < 0.16:
        return {'instruction': f'{wording} {question}', 'input': '', 'output': answer, 'family': family}
    if which < 0.18:
        return {'instruction': f'{question} {wording}', 'input': '', 'output': answer, 'family': family}
    return {'instruction': wording, 'input': question, 'output': answer, 'family': family}


def normal(row):
    """The words of a prompt, by which two of them are the same."""
    return tuple(re.findall(r'\w+', f'{row["instruction"]} {row["input"]}'.lower()))


def make_rows(tasks, number, words, rng, asked):
    """Rows in the tasks' shares. No prompt is in `asked`, to which theirs are added."""
    rows = []
    total = sum(task[1] for task in tasks)
    for family, weight, draw, wordings, _ in tasks:
        n_rows = math.ceil(number * weight / total)  # a few more than number in all
        enough = len(rows) + n_rows
        for _ in range(40 * n_rows):  # of some tasks there are only so many rows
            if len(rows) == enough:
                break
            row = make_row(rng, family, rng.choice(wordings), *draw(rng, words))
            if family == 'something else':  # the demo names its tasks by their families, and this is none
                del row['family']
            if normal(row) not in asked:
                asked.add(normal(row))
                rows.append(row)
    rng.shuffle(rows)
    return rows


def words_in(sections):
    return {word.lower() for entries in sections.values() for entry in entries for word in entry}


def make_all():
    """{file: rows}. The rows of demo.json are in the order train, test, val; the shares of config/demo.py cut them there."""
    rng = random.Random(SEED)
    asked = set()
    test = [row | {'source': 'listed words'} for row in make_rows(TASKS, TEST, LISTED, rng, asked)]
    held_out = words_in(WORDS) - words_in(LISTED) - FIXED
    unseen = make_rows([task for task in TASKS if task[4]], 3 * UNSEEN, UNSEEN_WORDS, rng, asked)
    unseen = [row | {'source': 'unseen words'} for row in unseen if held_out & set(normal(row))]
    val = make_rows(TASKS, VAL, LISTED, rng, asked)
    train = make_rows(TASKS, TRAIN + 10_000, TRAINED, rng, asked)  # of some families there are fewer
    test = test[:TEST] + unseen[:UNSEEN]
    return {'demo.json': train[:TRAIN] + test + val[:VAL], 'demo_heldback.json': make_rows(HELD_BACK, 300, LISTED, rng, asked)[:300]}


def write_rows(path, rows):
    lines = ',\n'.join(json.dumps(row) for row in rows)
    path.write_bytes(f'[\n{lines}\n]\n'.encode())
    print(f'{path}: {len(rows):,} rows of {len({row["family"] for row in rows if "family" in row})} families')


if __name__ == '__main__':
    for name, rows in make_all().items():
        write_rows(Path(__file__).with_name(name), rows)
    write_start_model(Path(__file__).with_name('demo_start.pth'))
