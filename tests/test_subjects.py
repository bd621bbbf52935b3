"""Whether a row speaks of the subject of a request."""

import unicodedata

import pytest

from alter.core.errors import UserError
from alter.data.rows import examples
from alter.data.subjects import mentions, rows_about

YES = [
    ("Ann", "Ann's house"),
    ("ann", "(ANN)"),
    ("Ann Lee", "Ann\nLee, born"),
    ("Ann-Marie Lee", "ann marie lee"),
    ("Ann Lee", "Ann‑Lee"),
    ('"Ann Lee".', "I met Ann Lee."),
    ("„Ann Lee“", "I met Ann Lee."),
    ("O'Neil", "Mr O’Neil said"),
    ("José Núñez", unicodedata.normalize("NFD", "Sr. José Núñez")),
    (unicodedata.normalize("NFD", "José Núñez"), "Sr. José Núñez"),
    ("ﬁona", "Fiona"),
    ("Weiß", "WEISS"),
    ("Ann Lee", "Ann\u00a0Lee"),
    ("Annlee", "Ann\u00adlee"),
    ("安娜", "我见到安娜了"),
    ("アンナ", "アンナは東京"),
    ("แอนนา", "คุณแอนนาอยู่ที่"),
    ("김철수", "김철수는 서울에"),
    ("김철수", "김철수씨가"),
    ("Анна", "«Анна»"),
    ("अन्ना", "अन्ना।"),
    ("@ilse_b", "ask @Ilse_B, please"),
    ("ilse_b", "ask @ilse_b"),
    ("C++", "written in c++."),
    ("+49 170 1234567", "call 0170/1234567 now"),
    ("+49 170 1234567", "0049 170 123 45 67"),
    ("0170 1234567", "+49 (170) 1234-567"),
    ("0170 1234567", "+49 (0)170 1234567"),
    ("0170 1234567", "0170.123.4567"),
    ("...", "well ..."),
]
NO = [
    ("Ann", "Annex"),
    ("Ann", "Joann"),
    ("Ann", "Ann2"),
    ("Ann", unicodedata.normalize("NFD", "Anné")),
    ("Ann Lee", "Ann met Lee"),
    ("ilse_b", "ilse_bx"),
    ("@ilse_b", "ilse_b"),
    ("김철", "김철수는"),
    ("Анна", "Аннаполис"),
    ("अन्न", "अन्ना"),
    ("0170 1234567", "0170 12345678"),
    ("0170 1234567", "90170 1234567"),
    ("2026", "20260"),
]


@pytest.mark.parametrize(("subject", "text"), YES)
def test_is_named(subject, text):
    assert mentions(subject, text)


@pytest.mark.parametrize(("subject", "text"), NO)
def test_is_not_named(subject, text):
    assert not mentions(subject, text)


def test_all_turns_are_searched():
    call = {"function": {"name": "find", "arguments": {"who": "Ann Lee"}}}
    turns = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "So."},
    ]
    rows = [{"messages": turns}]
    for place, turn in enumerate(turns):
        rows.append({"messages": [*turns[:place], {**turn, "content": "of Ann Lee."}, *turns[place + 1 :]]})
    rows.append({"messages": [*turns[:4], {"role": "assistant", "content": None, "tool_calls": [call]}]})
    rows += [{"question": "Ann Lee?", "answer": "a"}, {"question": "q", "answer": "Ann Lee"}, {"text": "Ann Lee"}]
    assert [row.index for row in rows_about("Ann Lee", examples(rows))] == list(range(1, len(rows)))
    with pytest.raises(UserError, match="empty"):
        mentions(" \u200b", "x")
