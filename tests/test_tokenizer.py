"""Texts are read as people write them, by a tokenizer that travels with the checkpoint."""

import dataclasses
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from configs import schema
from configs.schema import Config
from errors import UserError
from input_pipeline import reviews
from input_pipeline.library_tokenizer import LibraryTokenizer, restored
from input_pipeline.tokenizer import make_vocabulary
from input_pipeline.vocabulary import EOS, UNK, Vocabulary
from tasks.classification import DataConfig, ModelConfig
from tests import runs
from tests.test_checks import make_task, refusal, table
from tests.test_resume import small_config

TEXTS = reviews.make_reviews(200, 1)[0][0]
TRAINED = ('basic', 'wordpiece', 'bpe')
PRINTED = """
import hashlib, sys
from input_pipeline import reviews
from input_pipeline.tokenizer import make_vocabulary
texts = reviews.make_reviews(200, 1)[0][0]
for kind in sys.argv[1:]:
    facts = make_vocabulary(kind, texts, 2, 300).facts()
    print(kind, hashlib.sha256(str(facts).encode()).hexdigest())
"""


def written(vocabulary: Vocabulary, text: str) -> list[str]:
    """Returns the parts of a text that its ids stand for."""
    return [piece for _, piece in vocabulary.tokens(text)]


def test_same_texts_give_the_same_tokenizer_in_every_process_with_any_threads() -> None:
    found = set()
    for threads in ('1', '4', '4', '4'):
        env = os.environ | {'RAYON_NUM_THREADS': threads, 'PYTHONPATH': str(runs.ROOT)}
        found.add(runs.printed([sys.executable, '-c', PRINTED, *TRAINED], runs.ROOT, env, 60))
    assert len(found) == 1
    assert len(set(found.pop().split())) == 2 * len(TRAINED)


@pytest.mark.parametrize('kind', ['words', 'characters', *TRAINED])
def test_facts_of_a_checkpoint_give_the_tokenizer_again(kind: str) -> None:
    vocabulary = make_vocabulary(kind, TEXTS, 2, 400)
    facts = json.loads(json.dumps(vocabulary.facts('source_')))
    again = restored(facts, kind, 'source_')
    assert again.names == vocabulary.names
    for text in [*TEXTS[:20], 'Never SEEN: zyx <eos> é 音乐']:
        assert again.tokens(text) == vocabulary.tokens(text)
        assert '<unk>' not in written(again, text)


def test_capitals_and_glued_punctuation_make_no_other_tokens() -> None:
    basic = make_vocabulary('basic', TEXTS, 1, 0)
    for kind in ('basic', 'wordpiece'):
        vocabulary = make_vocabulary(kind, TEXTS, 1, 500)
        for text in TEXTS[:50]:
            people = text.replace(' .', '.').replace(' ,', ',').replace(' !', '!').upper()
            assert people != text
            assert vocabulary.ids(people) == vocabulary.ids(text)
    assert UNK not in basic.ids('The FILM was\u00a0not "AWFUL"!'.replace('"', ''))
    assert written(basic, 'The FILM, e\u0301tude') == ['The', 'FILM', ',', 'e\u0301tude']


def test_letters_of_scripts_without_spaces_and_emoji_are_apart_and_accents_stay() -> None:
    basic = make_vocabulary('basic', ['音乐很糟糕, 画面', 'good😀', 'हिन्दी', 'cafe\u0301'], 1, 0)
    assert written(basic, '画面很糟good😀') == ['画', '面', '很', '糟', 'good', '😀']
    assert UNK not in basic.ids('画面很糟 GOOD 😀 हिन्दी CAFÉ')
    assert basic.ids('cafe हिनदी') == [UNK, UNK]


def test_a_character_of_several_tokens_is_shown_once() -> None:
    bpe = make_vocabulary('bpe', TEXTS, 2, 400)
    for text in ('\u623f\u95f4', '\U0001f600ok'):
        tokens = bpe.tokens(text)
        assert len(tokens) > len(text)
        assert ''.join(piece for _, piece in tokens) == text
        assert len(''.join(bpe.units(text))) > len(text)  # as in runs that have affixes


def test_bpe_knows_every_text_and_gives_it_back() -> None:
    bpe = make_vocabulary('bpe', TEXTS, 2, 400)
    for text in ('The FILM was awful!', 'Ünïcode 音乐 😀', TEXTS[0]):
        assert UNK not in bpe.ids(text)
        assert bpe.decode(bpe.marked(bpe.ids(text), 99, start=False)).strip() == text


@pytest.mark.parametrize('kind', TRAINED)
def test_marks_written_in_a_text_are_text(kind: str) -> None:
    vocabulary = make_vocabulary(kind, TEXTS, 1, 400)
    for mark in ('<pad>', '<bos>', '<eos>'):
        assert not {0, 2, 3} & set(vocabulary.ids(f'a {mark} b'))


@pytest.mark.parametrize('kind', TRAINED)
def test_an_end_mark_separates_two_text_features(kind: str) -> None:
    vocabulary = make_vocabulary(kind, ['good [sep] bad', 'bad good'], 1, 300)
    good, bad = vocabulary.ids('good'), vocabulary.ids('bad')
    assert vocabulary.ids('good [sep] bad') == [*good, EOS, *bad]
    assert '[sep]' in written(vocabulary, 'good [sep] bad')
    assert 'sep' not in vocabulary.names


# The path of a tokenizer.json


def bert_json(*missing: str) -> str:
    """Returns a tokenizer like BERT's: other marks, later ids, and a truncation of its own."""
    names = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
    vocabulary = {'[PAD]': 0, '[UNK]': 5, '[CLS]': 6, '[SEP]': 7, 'good': 8, 'film': 9, '##s': 10}
    for name in missing:
        vocabulary[name.strip('[]')] = vocabulary.pop(name)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token='[UNK]'))
    tokenizer.add_special_tokens([name for name in names if name not in missing])
    base = json.loads(make_vocabulary('wordpiece', ['a'], 1, 0).facts()['tokenizer'])
    if '[CLS]' not in missing:
        marks = [('[CLS]', 6), ('[SEP]', 7)]
        tokenizer.post_processor = TemplateProcessing('[CLS] $A [SEP]', special_tokens=marks)
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=12)
    whole = json.loads(tokenizer.to_str())
    return json.dumps(whole | {name: base[name] for name in ('normalizer', 'pre_tokenizer')})


def test_a_tokenizer_file_keeps_its_ids_and_marks(tmp_path: Path) -> None:
    file = tmp_path / 'tokenizer.json'
    file.write_text(bert_json())
    task = make_task(tmp_path, [('Good films', 'pos'), ('film', 'neg')], tokenizer=str(file))
    rows = task.train.batch([0, 1], 6)
    assert rows['token_ids'].tolist() == [[6, 8, 9, 10, 7, 0], [6, 9, 7, 0, 0, 0]]
    assert '11 ids' in task.summary
    tokenizer = LibraryTokenizer(bert_json())
    assert tokenizer.first_word == 8
    assert tokenizer.ids('good bad') == [8, 5]
    assert tokenizer.decode([8, 9, 10, 5, 7, 0]) == 'good film ##s [UNK]'


def test_a_file_that_is_no_usable_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / 'tokenizer.json'
    for contents, reason in (
        (None, 'No such file'),
        ('{', 'not the JSON of a tokenizer'),
        (bert_json('[UNK]'), 'no unknown token'),
        (bert_json('[CLS]'), 'or no two marks around a text'),
    ):
        if contents:
            file.write_text(contents)
        message = refusal(tmp_path, [('a', 'pos'), ('b', 'neg')], tokenizer=str(file))
        assert message.startswith('config.data.tokenizer = ')
        assert reason in message
    with pytest.raises(UserError, match='expected one of words, characters, basic, wordpiece, bpe'):
        schema.check(Config(data=DataConfig(tokenizer='word'), model=ModelConfig()))


# Runs


def test_records_from_before_the_option_are_of_words() -> None:
    config = Config(data=DataConfig(tokenizer='words'), model=ModelConfig())
    record = schema.to_dict(config)
    del record['data.tokenizer'], record['data.vocab_size']
    assert not schema.trajectory_changes(config, record)
    fresh = schema.fill(Config(data=DataConfig(), model=ModelConfig()), record)
    assert fresh.data == config.data
    config.data.tokenizer = 'basic'
    (change,) = schema.trajectory_changes(config, record)
    assert change == "data.tokenizer: 'words' -> 'basic'"


def files_config(folder: Path, cells: list[tuple[str, str]], **options: Any) -> Config:
    """A small run on files."""
    file = table(folder / 'a.tsv', cells)
    buckets = {'bucket_lengths': (20, 42), 'window_batches': 2}
    data = DataConfig(source='files', train=file, evaluation=file, **(buckets | options))
    return dataclasses.replace(small_config(), data=data)


def test_the_default_for_files_reads_a_language_without_spaces(tmp_path: Path) -> None:
    draw = random.Random(0)
    cells = []
    for number in range(300):  # no text occurs twice
        letters = draw.choices('音乐画面剧情演员这片很点实在普通', k=8)
        letters.insert(draw.randrange(9), '有趣' if number % 2 else '乏味')
        cells.append((''.join(letters), 'pos' if number % 2 else 'neg'))
    task = make_task(tmp_path, cells[:200], cells[200:])
    assert task.evaluation.unknown == 0
    tokenizer = restored(task.resume_facts, '')
    (fun,) = tokenizer.ids('趣')
    rows = task.evaluation.batch(np.arange(100), 48)
    assert ((rows['token_ids'] == fun).any(axis=1) == rows['labels']).all()
    with pytest.raises(UserError, match='no token occurs that often'):
        make_task(tmp_path, cells[:200], cells[200:], tokenizer='words')


@pytest.mark.parametrize('kind', ['words', *TRAINED])
def test_tokenizer_learns_from_the_training_texts_alone(tmp_path: Path, kind: str) -> None:
    train = [(f'{text} {text} {text}', label) for text, label in (('film', 'a'), ('play', 'b'))]
    options: dict[str, Any] = {'tokenizer': kind, 'vocab_size': 300, 'affixes': (2, 2)}
    facts = [
        make_task(tmp_path, train, [(text, 'a')], **options).resume_facts
        for text in ('film', 'song song song song')
    ]
    for fact in facts:
        del fact['evaluation_data']
    assert facts[0] == facts[1]
