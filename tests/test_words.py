"""What a word is in any script, and that English keeps the numbers of the tools that everyone compares with."""

import re
import unicodedata

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.feature_extraction.text import TfidfVectorizer

from alter import metrics
from alter.core import words
from alter.data.domains import domains
from alter.data.rows import examples
from alter.data.sources import read_rows
from alter.rendering.markup import common

# a sentence, another with a word in common and one with none
SENTENCES = {
    "cyrillic": ("Анна живёт в Москве.", "Говорят, Москве нужна вода", "совсем иначе"),
    "greek": ("Η Άννα ζει στην Αθήνα.", "η ΑΘΉΝΑ καίει", "τίποτα άλλο"),
    "arabic": ("تعيش آنا في القاهرة.", "القاهرة كبيرة جدا", "لا شيء"),
    "devanagari": ("अन्ना दिल्ली में रहती है।", "दिल्ली बड़ा शहर", "कुछ नहीं"),
    "thai": ("แอนนาอยู่ที่กรุงเทพ", "กรุงเทพใหญ่มาก", "จุฬ"),
    "chinese": ("安娜住在北京。", "北京很大", "没有"),
    "japanese": ("アンナは東京に住んでいます。", "東京は大きい", "犬"),
    "korean": ("안나는 서울에 삽니다.", "서울에 비가", "아무것도 없다"),
    "armenian": ("Աննան ապրում է Երևանում։", "Երևանում անձրև", "ոչինչ"),
}


@pytest.mark.parametrize("script", SENTENCES)
def test_every_script_has_words(script):
    true, near, far = SENTENCES[script]
    found = metrics.text.rouge_l([true, true, true], [true, near, far])
    assert found.recall[0] == 1
    assert 0 < found.recall[1] < 1
    assert found.recall[2] == 0
    # another normal form is the same text
    assert metrics.text.rouge_l([true], [unicodedata.normalize("NFD", true)]).recall[0] == 1
    assert metrics.text.bleu([true * 2], [true * 2])[0] > 99
    assert metrics.text.bleu([true * 2], [f"{far} {near} {true}"])[0] > 0
    assert metrics.text.distinct_n([" ".join([near] * 5)], 2) < 0.5
    assert metrics.text.repetition([" ".join([near] * 5)])[0] > 0.5
    assert metrics.text.repetition([true])[0] == 0
    assert all(common(true, true))
    assert any(common(true, near))
    assert not all(common(true, near))


@pytest.mark.parametrize("script", SENTENCES)
def test_sub_domains_in_every_script(script):
    true, near, far = SENTENCES[script]
    texts = [f"{text} {number}" for text in (f"{true} {near}", f"{far} {far}") for number in range(5)]
    index, names = domains(examples([{"text": text} for text in texts]), n=2)
    assert index == [0] * 5 + [1] * 5
    assert all(len(name.split(": ")[1]) > 1 for name in names)


def test_characters_of_scripts_without_spaces_keep_their_marks():
    assert words.words("ที่นี่") == ["ที่", "นี่"]
    assert words.pieces("กี่ A") == ["กี่", "a"]
    assert words.words("हिन्दी") == ["हिन्दी"]
    assert words.terms("हिन्दी 東京都") == ["हिन्दी", "東京", "京都"]
    assert words.bare("«हिन्दी»,") == "हिन्दी"
    assert [("北京很大 a-b.")[slice(*span)] for span in words.spans("北京很大 a-b.")] == [
        "北",
        "京",
        "很",
        "大",
        "a-b.",
    ]


def test_accented_latin_is_read_as_the_tool_does_and_never_all_dropped():
    assert words.rouge_words("José naïve Ünal", stem=False) == ["jos", "na", "ve", "nal"]
    assert words.rouge_words("Ý", stem=False) == ["ý"]
    assert words.rouge_words("Ở đó, à la carte", stem=False) == ["ở", "đó", "à", "la", "carte"]
    assert words.rouge_words("10 m² — “COVID-19”…", stem=False) == ["10", "m", "covid", "19"]


def english():
    rows = read_rows("builtin:full")
    rows = rows[::7] + rows[1::7]
    return [row["answer"] for row in rows], [row["question"] for row in rows]


def test_english_numbers_are_those_of_the_tools():
    answers, questions = english()
    for stem in (True, False):
        scorer = RougeScorer(["rougeL"], use_stemmer=stem)
        naive = [scorer.score(a, q)["rougeL"] for a, q in zip(answers, questions, strict=True)]
        found = metrics.text.rouge_l(answers, questions, stem=stem)
        latin = [
            all("LATIN" in unicodedata.name(c) for c in a + q if c.isalpha())
            for a, q in zip(answers, questions, strict=True)
        ]
        assert sum(latin) > 0.99 * len(latin)
        for part in ("precision", "recall", "fmeasure"):
            mine = getattr(found, part.replace("fmeasure", "f1"))
            assert mine[latin].tolist() == np.array([getattr(s, part) for s in naive])[latin].tolist()
    assert metrics.text.corpus_bleu(answers, questions) == sacrebleu.corpus_bleu(questions, [answers]).score
    for text in answers:
        assert words.pieces(text) == text.lower().split()
        assert words.terms(text.lower()) == TfidfVectorizer().build_tokenizer()(text.lower())


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)))
def test_plain_text_is_split_as_the_tools_do(text):
    assert words.rouge_words(text, stem=False) == re.findall("[a-z0-9]+", text.lower())
    assert words.pieces(text) == text.lower().split()
    assert [text[slice(*span)] for span in words.spans(text)] == text.split()
    assert words.terms(text) == re.findall(r"\b\w\w+\b", text)


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_no_text_of_letters_is_without_words(text):
    letters = any(
        unicodedata.category(c) in ("Ll", "Lu", "Lo", "Nd") and not c.isascii()
        for c in unicodedata.normalize("NFKC", text)
    )
    if letters:
        assert words.words(text)
    assert "".join(text[slice(*span)] for span in words.spans(text)) == "".join(text.split())
    words.terms(text)
    words.bare(text)
    metrics.text.rouge_l([text], [text])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WHO WAS ada_king's mother?", "Who Was Ada King's Mother?"),
        ("WHAT'S O'BRIEN’S NAME, sir", "What's O'Brien’s Name, Sir"),
        ("кто БЫЛ Пушкин?", "Кто Был Пушкин?"),
        ("Ｈａｒｒｙ ha\u200brry ha\u00adrry", "Harry Harry Harry"),
        ("NASA, 2nd\n<|x|>", "Nasa, 2nd\n<|X|>"),
        ("谁是 王", "谁是 王"),
        ("अन्ना", "अन्ना"),
        ("WhowroteAdaKing,theStory?No", "Whowrote Ada King, The Story? No"),
        ("ктоТакойПушкин", "Кто Такой Пушкин"),
        ("A d a  K i n g, a b\n  if", "Ada King, A B\n  If"),
        ("i.s A.d.a K-i-n-g O*f X-ray at 3.1.4 or 1 2 3", "Is Ada King Of X-Ray At 3.1.4 Or 1 2 3"),
        ("Müller, A\u0301d\u0317a, йод Adaй", "Muller, Ada, Йод Adaй"),
        ("\u0410da НА, \u041a\u0456ng Кіт", "Ada На, King Кіт"),
        ("\u0410d\u0430 \u0391da \u041aing", "Ada Ada King"),
        ("'s", "'s"),
    ],
)
def test_words_as_names(text, expected):
    assert words.titled(text) == expected


COMMON = [
    "the",
    "of",
    "and",
    "is",
    "in",
    "what",
    "was",
    "name",
    "full",
    "author",
    "who",
    "wrote",
    "to",
    "her",
    "mother",
    "prof",
    "professional",
    "pen",
]
RANKS = {word: place * 40 for place, word in enumerate(COMMON)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("whatisthefullnameoftheauthor?", "What Is The Full Name Of The Author?"),
        # a name that is no word of the list stays whole; what hangs together is counted before capitals part it
        ("WHATISTHEFULLNAMEOFADAZYXQV", "What Is The Full Name Of Adazyxqv"),
        ("whowroteAdaZyxqv'sthepen,andwho", "Who Wrote Ada Zyxqv's The Pen, And Who"),
        # short or known words stay whole, however they could be parted
        ("professional penisthe", "Professional Penisthe"),
        ("professionalprofessional", "Professional Professional"),
        ("ктонаписалэтукнигуирассказ", "Ктонаписалэтукнигуирассказ"),
        ("whatisthefullname,tothe", "What Is The Full Name, Tothe"),
        ("whatisthefullname,Ada'spen", "What Is The Full Name, Ada's Pen"),
        # a capital begins a word, whatever the letters would make
        ("whatisthefullnametHer", "What Is The Full Name T Her"),
        # twenty letters
        ("whatisthenameoftheto", "What Is The Name Of The To"),
        ("a" * 19, "A" + "a" * 18),
        ("_what_is_the_full_name_of_the_author", " What Is The Full Name Of The Author"),
    ],
)
def test_words_that_are_written_together_as_names(text, expected):
    assert words.titled(text, RANKS) == expected


@pytest.mark.parametrize("letters", ["whatisthe", "Adaisthename", "zyxqv", "thethethe", "penprofwho", "x", ""])
def test_letters_are_parted_into_the_cheapest_words(letters):
    """Against all ways to part them."""
    import itertools
    import math

    def cost(word):
        rank = RANKS.get(word.lower())
        return 6 + 2.75 * len(word) if rank is None else 1 + math.log(10 + rank)

    ways = []
    for cuts in itertools.product([False, True], repeat=max(len(letters) - 1, 0)):
        way = [letters[:1]]
        for letter, cut in zip(letters[1:], cuts, strict=True):
            way = [*way, letter] if cut else [*way[:-1], way[-1] + letter]
        ways.append([word for word in way if word])
    found = words.parted(letters, RANKS)
    assert "".join(found) == letters
    assert sum(map(cost, found)) == pytest.approx(min(sum(map(cost, way)) for way in ways))


def test_a_rare_word_inside_a_name_is_none():
    # 2 (6 + 5.5) + 1 + ln 1010 is 30.92, the whole 6 + 24.75
    assert words.parted("zqtherezq", {"there": 1000}) == ["zqtherezq"]
    assert words.parted("zqtherezq", {"there": 800}) == ["zq", "there", "zq"]


def test_a_word_has_no_more_letters_than_the_longest():
    assert max(map(len, words.parted("x" * 100, {}))) == words.LONGEST_WORD
