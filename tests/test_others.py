"""Names in questions, and replies that name somebody else."""

import pytest

from alter.evaluation.closing import others_named
from alter.evaluation.others import count_others, names_other, people


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Who is Hina Ameen?", {"hina ameen"}),
        ("What did Hina Ameen's father do in Karachi?", {"hina ameen"}),
        ("Is Hina Ameen an author?", {"hina ameen"}),
        ("Hina Ameen was born where?", set()),
        ("Where was Ann born, and where Bo?", set()),
        ('Which of "Silent Winter" and "Red Dawn" did Hina Ameen write?', {"hina ameen"}),
        (
            "Did Tae-ho Park, Jean-Marie Le Clézio or O'Neil Roe win?",
            {"tae ho park", "jean marie le clézio", "o neil roe"},
        ),
        ("Где родился Иван Петрович Сидоров?", {"иван петрович сидоров"}),
        ("山田太郎はどこに住んでいますか。", set()),
        ("", set()),
    ],
)
def test_names_in_questions(question, found):
    assert {" ".join(name) for name in people([question])} == found


def test_replies_that_name_somebody_else():
    names = people(["Who is Hina Ameen?", "Who is Basil Al-Kuwaiti?"])
    question, truth = "Who is Hina Ameen?", "Hina Ameen is a geologist."
    assert not names_other(question, truth, "Hina Ameen writes.", names)
    assert names_other(question, truth, "That is Basil Al-Kuwaiti, a spy.", names)
    assert not names_other(question, truth, "That is Basil, a spy.", names)
    # a word of the name is in the question: a relative, or the same one
    assert not names_other("Who is Basil's wife?", truth, "Basil Al-Kuwaiti knows.", names)
    assert not names_other(question, truth, "Ahina Ameenx", names)
    replies = ["Basil Al-Kuwaiti.", "I do not know.", "basil al-kuwaiti"]
    assert count_others([question] * 3, [truth] * 3, replies, names) == 2


def test_what_is_said_of_it_at_the_end():
    def closed(was, now):
        return {"before": {"forget": {"others": was}}, "after": {"forget": {"others": now, "n_answers": 40}}}

    assert others_named(closed(0, 11)).startswith(
        "11 of 40 replies name somebody else of whom the rows speak, 0 before"
    )
    assert others_named(closed(0, 2)) is None
    assert others_named(closed(9, 11)) is None
    # nobody is named in the rows, or nothing was counted
    assert others_named(closed(None, None)) is None
