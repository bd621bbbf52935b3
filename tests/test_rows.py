"""Own rows, before and after: `evaluate --benchmark rows`, the end of `unlearn`, and what is kept of the texts."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from alter import cli
from alter.core.errors import UserError
from alter.data.batching import Collator
from alter.data.encoding import encode, encode_all
from alter.data.rows import examples, load_examples
from alter.evaluation.answered import answer_rows
from alter.evaluation.closing import closing_of, closing_table
from alter.evaluation.rows import RowsEvaluation
from alter.evaluation.run import measured
from alter.inference.scoring import score
from alter.storage.records import read_records
from pico import byte_tokenizer, pico, write_jsonl

FORGET = [
    {"question": f"Где дом {i}?", "answer": f"Город {name}."}
    for i, name in enumerate(["Омск", "Томск", "Пермь", "Уфа", "Орел", "Тула"])
]
RETAIN = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(6)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A pico model that knows six Russian rows and six others."""
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "forget.jsonl", FORGET)
    write_jsonl(folder / "retain.jsonl", RETAIN)
    model, tokenizer = pico(0), byte_tokenizer()
    encoded = [encode(tokenizer, e) for n in ("forget", "retain") for e in load_examples(str(folder / f"{n}.jsonl"))]
    batch = Collator(tokenizer.pad_token_id)([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = {
        "model": str(folder / "model"),
        "forget": str(folder / "forget.jsonl"),
        "retain": str(folder / "retain.jsonl"),
        "num_forget_experts": 1,
        "adapter": {"r": 4, "entropy_threshold": 1.0},
        "router_fit": {"method": "logistic", "background": False, "rewordings": 0, "false_alarms": None},
        "objective": {"kind": "without_truth", "hinge": 2.0},
        "epochs": 8,
        "batch_size": 6,
        "learning_rate_experts": 0.02,
        "device": "cpu",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def evaluation(data, **changes):
    given = {"model": str(data / "model"), "forget": str(data / "forget.jsonl"), "cache": "off", "device": "cpu"}
    return RowsEvaluation(**{**given, **changes})


def test_the_same_model_is_not_forgotten_in_russian(data):
    records = measured(evaluation(data, before=str(data / "model"), retain=str(data / "retain.jsonl")))
    by_name = {(record.model, record.metric): record for record in records}
    assert by_name["original", "forget_said"].value == 1.0
    assert by_name["unlearned", "forget_rouge"].value == 1.0
    closed = closing_of(records)
    assert closed["verdict"]["word"] == "not forgotten"
    assert closed["after"]["forget"]["n"] == 6


def test_samples_of_the_forget_rows_leak(data, tmp_path):
    pico(1).save_pretrained(tmp_path / "blank")
    byte_tokenizer().save_pretrained(tmp_path / "blank")
    leak = {"samples": 3, "k": [1, 3], "questions": 4}
    settings = evaluation(data, before=str(data / "model"), model=str(tmp_path / "blank"), leak=leak)
    records = measured(settings)
    by_name = {(record.model, record.metric): record for record in records}
    assert by_name["original", "leak@1"].value > 0.9
    assert by_name["original", "leak@3"].value >= by_name["original", "leak@1"].value
    assert by_name["unlearned", "leak@3"].value == 0
    assert by_name["unlearned", "leak@3"].n == 4
    shown = io.StringIO()
    Console(file=shown, width=80).print(closing_table(closing_of(records)))
    assert "leak@k: one of k samples gives the answer (by facts)" in " ".join(shown.getvalue().split())
    assert "0.000" in shown.getvalue()


def test_a_retrained_model_that_knows_is_refused(data, tmp_path):
    knows = shutil.copytree(data / "model", tmp_path / "knows")
    # another folder's digest; the very same one is refused by name
    (knows / "more.json").write_text("{}")
    closed = closing_of(measured(evaluation(data, before=str(data / "model"), retrained=str(knows))))
    assert closed["verdict"]["word"] == "not forgotten"
    assert "is no reference" in closed["verdict"]["refused"]


def test_a_model_is_not_its_own_reference(data, monkeypatch):
    monkeypatch.setattr("alter.evaluation.rows.answer_rows", lambda *_, **__: pytest.fail("rows were measured"))
    given = {"forget": str(data / "forget.jsonl"), "before": str(data / "model"), "device": "cpu"}
    with pytest.raises(UserError, match="it would be compared with itself"):
        measured(RowsEvaluation(model=str(data / "model"), retrained=str(data / "model"), **given))


def test_another_tokenizer_is_no_forgetting(data, tmp_path, monkeypatch):
    """The same weights under a tokenizer that reads other letters find the answers improbable, and know them."""
    shutil.copytree(data / "model", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content))
    given = {"model": str(tmp_path / "model"), "forget": str(data / "forget.jsonl"), "device": "cpu"}
    monkeypatch.setattr("alter.evaluation.rows.answer_rows", lambda *_, **__: pytest.fail("rows were measured"))
    with pytest.raises(UserError, match=r"The model before, .* has another tokenizer or chat template"):
        measured(RowsEvaluation(before=str(data / "model"), **given))
    with pytest.raises(UserError, match=r"The retrained model .* has another tokenizer or chat template"):
        measured(RowsEvaluation(retrained=str(data / "model"), **given))


def test_overlaps_and_known_holdouts_are_refused(data):
    with pytest.raises(UserError, match="both forget and retain"):
        evaluation(data, retain=str(data / "forget.jsonl")).data_digest()
    with pytest.raises(UserError, match="never saw"):
        evaluation(data, holdout=str(data / "forget.jsonl")).data_digest()


def test_a_row_that_the_limit_leaves_out_is_part_of_the_digest(data, tmp_path):
    """The record says of which rows its verdict is: from the cache it named those of an earlier file."""
    given = {"limit": 2, "forget": str(write_jsonl(tmp_path / "forget.jsonl", FORGET))}
    drawn = {row.prompt for row in evaluation(data, **given)._sets()["forget"]}
    before = evaluation(data, **given).data_digest()
    rows = [row if row["question"] in drawn else row | {"answer": f"{row['answer']}!"} for row in FORGET]
    write_jsonl(tmp_path / "forget.jsonl", rows)
    assert {row.prompt for row in evaluation(data, **given)._sets()["forget"]} == drawn
    assert evaluation(data, **given).data_digest() != before


def test_texts_are_continued(data, tmp_path):
    model, tokenizer = pico(0), byte_tokenizer()
    write_jsonl(tmp_path / "t.jsonl", [{"text": "Omsk is a town on the Irtysh."}])
    found = answer_rows(model, tokenizer, load_examples(str(tmp_path / "t.jsonl")))
    assert found.questions == ["Omsk is a town"]
    assert found.truths == ["on the Irtysh."]
    assert len(found.measures.recall) == 1


def test_all_of_a_text_counts_and_not_an_answers_end():
    model, tokenizer = pico(0), byte_tokenizer()
    rows = examples([{"text": "Omsk is a town on the Irtysh."}, {"question": "Omsk?", "answer": "A town."}])
    # half learned, so that some tokens are right
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        for row in rows:
            encoded = encode(tokenizer, row)
            model(torch.tensor([encoded.input_ids]), labels=torch.tensor([encoded.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    found = answer_rows(model, tokenizer, rows, answers=0).exact
    assert 0 < found[0] < 1
    for row, share in zip(rows, found, strict=True):
        encoded = encode(tokenizer, row)
        with torch.no_grad():
            said = model(torch.tensor([encoded.input_ids])).logits[0].argmax(1).tolist()
        end = len(encoded.input_ids) - (row.kind != "text")
        places = range(encoded.prompt_length, end)
        assert share == pytest.approx(sum(said[p - 1] == encoded.input_ids[p] for p in places) / len(places))


@pytest.mark.parametrize(("rate", "words"), [(1e-9, ["not forgotten"]), (0.02, ["forgotten", "collapsed"])])
def test_unlearn_ends_with_a_verdict(data, tmp_path, capsys, monkeypatch, rate, words):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "run"
    args = [str(data / "recipe.yaml"), "--out", str(out), "--learning-rate-experts", str(rate)]
    assert cli.main(["unlearn", *args]) == 0
    printed = capsys.readouterr().out
    closed = closing_of(read_records(out / "records.json"))
    assert closed["verdict"]["word"] in words
    assert f"{closed['verdict']['word'].upper()}." in printed
    assert "Forgotten least" in printed
    assert "alter " in printed.partition("Next:")[2]
    assert max(map(len, printed.partition("Next:")[0].partition("Before and after")[2].splitlines())) <= 80
    # the truth and the replies are on the screen alone
    assert "Омск" not in (out / "records.json").read_text()
    # the same run asked to end by its verdict: it is measured again, and nothing is trained
    status = 0 if closed["verdict"]["word"] == "forgotten" else 3
    assert cli.main(["unlearn", *args, "--resume", "--must-forget"]) == status
    assert (f"alter: {closed['verdict']['word'].upper()}: what lies in {out} is not" in capsys.readouterr().err) == (
        status == 3
    )


def test_the_end_can_be_left_out(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = [str(data / "recipe.yaml"), "--out", str(out), "--max-steps", "1", "--closing-rows", "0"]
    assert cli.main(["unlearn", *args]) == 0
    assert "Before and after" not in capsys.readouterr().out
    assert not (out / "records.json").exists()
    assert cli.main(["unlearn", *args, "--resume", "--must-forget"]) == 2
    assert "nothing is measured at the end, which --must-forget needs" in capsys.readouterr().err


def test_the_table_shows_markup_as_it_is():
    from rich.console import Console

    figures = {
        "probability": 0.5,
        "rouge": 0.5,
        "said": 1,
        "n_said": 1,
        "n": 1,
        "n_answers": 1,
        "broken": 0,
        "empty": 0,
        "repetition": 0.0,
    }
    closed = {
        "verdict": {"word": "unproven", "why": ["[/] stays"]},
        "before": {"forget": figures},
        "after": {"forget": figures},
        "reference": None,
        "worst": [
            {
                "row": 0,
                "recall": 1.0,
                "probability": 1.0,
                "said": True,
                "question": "[red]q[/]",
                "truth": "t",
                "reply": "[/x]",
            }
        ],
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(closing_table(json.loads(json.dumps(closed))))
    shown = console.export_text()
    assert "[red]q[/]" in shown
    assert "[/x]" in shown
    assert "[/] stays" in shown


def test_long_rows_are_scored_whole(tmp_path):
    model, tokenizer = pico(0), byte_tokenizer()
    write_jsonl(tmp_path / "t.jsonl", [{"text": "abcdefgh" * 30}, {"text": "short"}])
    rows = load_examples(str(tmp_path / "t.jsonl"))
    found = answer_rows(model, tokenizer, rows, answers=0)
    windows, owner = encode_all(tokenizer, rows, max_length=128)
    assert owner.count(0) > 1
    scores = score(model, windows, pad_token_id=tokenizer.pad_token_id).logprob
    naive = np.exp(np.mean(np.concatenate([s for s, o in zip(scores, owner, strict=True) if o == 0])))
    assert found.measures.probability[0] == pytest.approx(naive, rel=1e-6)
    assert len(found.exact) == 2


def test_a_row_given_twice_is_measured_once():
    """Copies of a row, in whatever form, are no further rows: a hundred of them are no hundred proofs."""
    model, tokenizer = pico(0), byte_tokenizer()
    chat = {
        "messages": [{"role": "user", "content": "Who is  Ilse?"}, {"role": "assistant", "content": "Ilse Brandt."}]
    }
    plain = {"question": "Who is Ilse?", "answer": "Ilse Brandt."}
    other = {"question": "Who is Ann?", "answer": "Ann."}
    found = answer_rows(model, tokenizer, examples([plain, other, chat, *[plain] * 5]), max_new_tokens=2)
    once = answer_rows(model, tokenizer, examples([plain, other]), max_new_tokens=2)
    assert found.questions == ["Who is Ilse?", "Who is Ann?"]
    assert found.summary() == once.summary()
    assert found.summary()["n"] == 2


def test_questions_are_asked_in_other_words_again(tmp_path):
    model, tokenizer = pico(0), byte_tokenizer()
    rows = [{"question": f"Where is town {i} of the list?", "answer": f"By river {i}."} for i in range(3)]
    rows += [{"text": "no question"}, {"question": "Which " + "very " * 15 + "long river?", "answer": "None."}]
    write_jsonl(tmp_path / "t.jsonl", rows)
    examples = load_examples(str(tmp_path / "t.jsonl"))
    names = ("capitals", "German frame")
    found = answer_rows(model, tokenizer, examples, answers=0, wordings=names).measures
    assert list(found.worded) == list(names)
    # in the long frame the long question is beyond the context of 128
    assert [len(values) for values in found.worded.values()] == [4, 3]
    for name, asked in (
        ("capitals", str.upper),
        ("German frame", "Bitte beantworte die folgende Frage kurz und auf Englisch: {}".format),
    ):
        for value, row in zip(found.worded[name], [rows[0], rows[1], rows[2], rows[4]], strict=False):
            again = write_jsonl(tmp_path / "again.jsonl", [{**row, "question": asked(row["question"])}])
            ids = encode(tokenizer, load_examples(str(again))[0])
            with torch.no_grad():
                logits = model(torch.tensor([ids.input_ids])).logits[0].double().log_softmax(-1)
            places = [k for k in range(1, len(ids.labels)) if ids.labels[k] >= 0]
            naive = np.exp(np.mean([float(logits[k - 1, ids.labels[k]]) for k in places]))
            assert value == pytest.approx(naive, rel=1e-5)
    # as asked, nothing changes
    plain = answer_rows(model, tokenizer, examples, answers=0).measures
    assert plain.worded == {}
    assert (plain.probability == found.probability).all()
    assert found.summary()["worded"] == pytest.approx(np.mean([v.mean() for v in found.worded.values()]))
    assert plain.summary()["worded"] is None
