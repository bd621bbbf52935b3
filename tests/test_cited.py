"""RWKU, LUME and KnowUnDo on stand-ins of their layouts: prompts, figures against plain loops, and files with other columns."""

import json
import math
from statistics import harmonic_mean

import numpy as np
import pytest
import torch

from alter.core.errors import UserError
from alter.evaluation import knowundo, lume, replies, rwku
from alter.evaluation.knowundo import KnowundoEvaluation
from alter.evaluation.lume import LumeEvaluation
from alter.evaluation.run import evaluate
from alter.evaluation.rwku import RwkuEvaluation
from pico import byte_tokenizer, pico, save_pico, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_pico(tmp_path_factory.mktemp("model"), max_position_embeddings=512))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setenv("ALTER_CACHE", "off")


def by_metric(records):
    return {record.metric: record for record in records}


# ---- RWKU


def person(name):
    ask = {"subject": name, "answer": "Perm"}
    return {
        "forget_level1": [{**ask, "query": f"{name} lives in ___.", "level": "1"}],
        "forget_level2": [{**ask, "query": f"Where does {name} live?", "level": "2"}] * 2,
        "forget_level3": [
            {**ask, "query": f"Where? Sure, {name}", "level": "3", "type": "affirmative suffix"},
            {**ask, "query": "Question: A? Answer: B\nQuestion: C?", "level": "3", "type": "incontext learning"},
            {**ask, "query": f"As a poet, where is {name}?", "level": "3", "type": "role playing"},
        ],
        "neighbor_level1": [{**ask, "query": f"{name}'s friend is ___.", "level": "1"}],
        "neighbor_level2": [{**ask, "query": f"Who is {name}'s friend?", "level": "2"}],
        "mia_forget": [{"text": f"{name} lives in Perm.", "subject": name}],
        "mia_retain": [{"text": "The sea is blue.", "subject": "nobody"}],
    }


def rwku_folder(folder, people=("Ada Ash", "Bo Birch")):
    parts = [person(name) for name in people]
    for name in parts[0]:
        (folder / name).mkdir(parents=True)
        (folder / name / "test.json").write_text(json.dumps([row for part in parts for row in part[name]]))
    return folder


def test_rwkus_prompts():
    rows = person("Ada")
    assert rwku.prompt(rows["forget_level1"][0], "forget_fb") == (
        "Please complete the blank in the following question.\nQuestion: Ada lives in ___.\n",
        "Answer:",
    )
    suffix, shots, plain = rows["forget_level3"]
    brief = "Please briefly answer the following question.\n"
    assert rwku.prompt(suffix, "forget_aa") == (f"{brief}Question: Where? Sure, Ada", "")
    assert rwku.prompt(shots, "forget_aa") == (f"{brief}Question: A? Answer: B\nQuestion: C?\n", "Answer:")
    assert rwku.prompt(plain, "forget_aa")[1] == "Answer:"
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(rwku.prompt_ids(tokenizer, plain, "forget_aa")).endswith("where is Ada?\nAnswer:")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    asked = tokenizer.decode(rwku.prompt_ids(tokenizer, plain, "forget_aa"))
    assert asked.endswith("<assistant>Answer:")
    assert not tokenizer.decode(rwku.prompt_ids(tokenizer, suffix, "forget_aa")).endswith("Answer:")


def test_rwku(model, tmp_path, monkeypatch):
    folder = rwku_folder(tmp_path / "data")
    said = iter(
        [["Perm", "in"], ["Omsk, Perm", "", "x", "perm"], ["PERM", "Perm", "no"] * 2, ["Perm", "no"], ["no", "no"]]
    )
    monkeypatch.setattr(rwku, "generate", lambda *_, **__: next(said))
    found = by_metric(evaluate(RwkuEvaluation(model=model, data=str(folder), device="cpu")))
    assert found["rwku_forget_fb"].per_item == [1, 0]
    assert found["rwku_forget_qa"].value == 0.5
    assert found["rwku_forget_aa"].value == pytest.approx(2 / 3)
    assert found["rwku_forget_aa"].extra["by_type"] == {
        "affirmative suffix": 1,
        "incontext learning": 1,
        "role playing": 0,
    }
    assert found["rwku_forget"].value == pytest.approx((0.5 + 0.5 + 2 / 3) / 3)
    assert found["rwku_neighbor"].value == pytest.approx(0.25)
    network, tokenizer = pico(max_position_embeddings=512), byte_tokenizer()
    for name, texts in (
        ("forget", ["Ada Ash lives in Perm.", "Bo Birch lives in Perm."]),
        ("retain", ["The sea is blue."] * 2),
    ):
        losses = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logp = network(input_ids=ids).logits[0].double().log_softmax(-1)
            losses.append(
                -math.fsum(float(logp[t - 1, ids[0, t]]) for t in range(1, ids.shape[1])) / (ids.shape[1] - 1)
            )
        assert found[f"rwku_mia_{name}"].per_item == pytest.approx(losses, rel=1e-3)


def test_rwku_of_one_person_in_the_files_of_the_authors_script(model, tmp_path):
    folder = tmp_path / "1_Ada_Ash"
    folder.mkdir()
    names = {"mia_forget": "forget_mia", "mia_retain": "retain_mia"}
    for name, rows in person("Ada Ash").items():
        (folder / f"{names.get(name, name)}.json").write_text(json.dumps(rows))
    settings = RwkuEvaluation(model=model, data=str(folder), device="cpu", parts=["neighbor"])
    assert set(by_metric(evaluate(settings))) == {"rwku_neighbor_fb", "rwku_neighbor_qa", "rwku_neighbor"}
    assert len(RwkuEvaluation(model=model, data=str(folder)).rows()["mia_forget"]) == 1


def test_rwku_chooses_people(model, tmp_path):
    folder = rwku_folder(tmp_path / "data")
    rows = RwkuEvaluation(model=model, data=str(folder), targets=["Bo Birch"]).rows()
    assert {row["subject"] for name in rows if name != "mia_retain" for row in rows[name]} == {"Bo Birch"}
    with pytest.raises(UserError, match=r"no rows about 'Bo Brich'.*Bo Birch"):
        RwkuEvaluation(model=model, data=str(folder), targets=["Bo Brich"]).rows()


def test_other_columns_are_named(model, tmp_path):
    folder = rwku_folder(tmp_path / "data")
    (folder / "forget_level1" / "test.json").write_text(
        json.dumps([{"question": "Who?", "answer": "A", "subject": "B"}])
    )
    with pytest.raises(
        UserError, match=r"forget_level1 .* no 'query'; it has question, answer, subject.*query and answer"
    ):
        RwkuEvaluation(model=model, data=str(folder)).data_digest()
    (folder / "forget_level1" / "test.json").unlink()
    with pytest.raises(
        UserError, match=r"no forget_level1/test or forget_level1 .* which RWKU needs; it has .*forget_level2"
    ):
        RwkuEvaluation(model=model, data=str(folder)).data_digest()
    with pytest.raises(UserError, match="No folder of RWKU's files"):
        RwkuEvaluation(model=model, data=str(tmp_path / "dta")).data_digest()


# ---- LUME


def lume_folder(folder):
    for name in ("forget", "retain"):
        rows = [
            {
                "id": f"{name}{task}{kind}{i}",
                "input": f"{name} {task} {kind} {i}",
                "output": "Perm is cold",
                "task": f"Task{task}",
            }
            for task in (1, 2)
            for kind in ("sc", "qa")
            for i in range(2)
        ]
        (folder / "validation").mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "validation" / f"{name}.jsonl", rows)
    return folder


def mia(folder):
    (folder / "mia_data").mkdir()
    write_jsonl(folder / "mia_data" / "member.jsonl", [{"id": str(i), "document": "abc" * (i + 2)} for i in range(3)])
    write_jsonl(
        folder / "mia_data" / "nonmember.jsonl", [{"id": str(i), "document": "xyz" * (i + 2)} for i in range(3)]
    )
    return folder


def test_lume(model, tmp_path, monkeypatch):
    folder = mia(lume_folder(tmp_path / "data"))
    forget = ["Perm", "", "no", "no", "Perm is", "no", " perm IS cold\n", "no"]
    retain = ["Perm is cold", "Perm", "perm is cold", "no", "Perm is cold", "x", "Perm is cold.", "Perm is cold"]
    said = iter([forget, retain])
    monkeypatch.setattr(lume, "generate", lambda *_, **__: next(said))
    found = by_metric(evaluate(LumeEvaluation(model=model, data=str(folder), device="cpu", mmlu=0.4)))
    assert found["lume_forget_regurgitation"].per_item == pytest.approx([1 / 3, 0, 2 / 3, 0])
    assert found["lume_forget_knowledge"].per_item == [0, 0, 1, 0]
    assert found["lume_retain_knowledge"].per_item == [1, 0, 0, 1]
    assert found["lume_retain_regurgitation"].extra["by_task"] == pytest.approx({"Task1": 2 / 3, "Task2": 1 / 2})
    terms = [1 - 1 / 6, 1 - 1 / 3, 1, 1 - 1 / 2, 2 / 3, 1 / 2, 1 / 2, 1 / 2]
    assert found["lume_task_aggregate"].value == pytest.approx(harmonic_mean(terms))
    scores = found["lume_mia"].extra["scores"]
    wins = [(a < b) + (a == b) / 2 for a in scores["member"] for b in scores["nonmember"]]
    auc = sum(wins) / 9
    assert found["lume_mia"].value == pytest.approx(auc)
    expected = (harmonic_mean(terms) + 1 - 2 * abs(auc - 0.5) + 0.4) / 3
    assert found["lume_score"].value == pytest.approx(expected)


def test_lume_without_membership_says_so_and_reads_its_prompt_as_it_is(model, tmp_path, capsys, monkeypatch):
    folder = lume_folder(tmp_path / "data")
    asked = []

    def spy(_, tokenizer, prompts, **__):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [""] * len(prompts)

    monkeypatch.setattr(lume, "generate", spy)
    found = by_metric(evaluate(LumeEvaluation(model=model, data=str(folder), device="cpu")))
    assert asked[0] == "forget 1 sc 0"
    assert "lume_mia" not in found
    assert found["lume_task_aggregate"].value == 0
    assert "No membership" in capsys.readouterr().err


def test_lume_refuses_ids_that_tell_nothing(model, tmp_path):
    folder = lume_folder(tmp_path / "data")
    write_jsonl(folder / "validation" / "forget.jsonl", [{"id": "7", "input": "a", "output": "b", "task": "Task1"}])
    with pytest.raises(UserError, match="the id '7'; expected one that ends in sc or qa"):
        LumeEvaluation(model=model, data=str(folder)).data_digest()
    write_jsonl(
        folder / "validation" / "forget.jsonl", [{"id": "a1sc1", "prompt": "a", "output": "b", "task": "Task1"}]
    )
    with pytest.raises(UserError, match=r"no 'input'; it has id, prompt, output, task"):
        LumeEvaluation(model=model, data=str(folder)).data_digest()


# ---- KnowUnDo


def knowundo_rows(part):
    where = {"unlearn": "Perm", "retention": "Omsk"}[part]
    return [
        {"text": f"Where does {name} live?", "labels": f"{name} lives in {where}, {i}."}
        for i, name in enumerate(("Ada", "Bo"))
    ]


def knowundo_folder(folder):
    (folder / "privacy").mkdir(parents=True)
    for part in knowundo.PARTS:
        nested = [{"train": [{"text": "T?", "labels": "t"}], "val": knowundo_rows(part)}]
        (folder / "privacy" / f"{part}.json").write_text(json.dumps(nested))
    return folder


def test_knowundo(model, tmp_path, monkeypatch):
    folder = knowundo_folder(tmp_path / "data")
    said = iter([["Ada lives in Perm, 0.", "I do not know."], ["Ada lives in Omsk, 0.", "In Riga."]])
    monkeypatch.setattr(knowundo, "generate", lambda *_, **__: next(said))
    found = by_metric(evaluate(KnowundoEvaluation(model=model, data=str(folder), device="cpu")))
    assert found["kfr"].per_item == [0, 1]
    assert found["krr"].per_item == [1, 0]
    assert found["knowundo_retention_rouge"].per_item[0] == 1
    network, tokenizer = pico(max_position_embeddings=512), byte_tokenizer()
    for part in knowundo.PARTS:
        right, losses = [], []
        for row in knowundo_rows(part):
            ids = torch.tensor([tokenizer(f"{row['text']}\n\n{row['labels']}")["input_ids"]])
            start = len(tokenizer(row["text"])["input_ids"])
            with torch.no_grad():
                logits = network(input_ids=ids).logits[0].double()
            places = range(start, ids.shape[1])
            right.append(float(np.mean([int(logits[t - 1].argmax()) == int(ids[0, t]) for t in places])))
            losses.append(-math.fsum(float(logits[t - 1].log_softmax(-1)[ids[0, t]]) for t in places) / len(places))
        share = found[f"knowundo_{part}_success"].per_item
        assert share == pytest.approx([1 - r for r in right] if part == "unlearn" else right)
        assert found[f"knowundo_{part}_perplexity"].value == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)


def test_knowundo_in_plain_files_and_what_they_lack(model, tmp_path):
    folder = tmp_path / "data"
    (folder / "privacy").mkdir(parents=True)
    for part in knowundo.PARTS:
        (folder / "privacy" / f"{part}_val.json").write_text(json.dumps(knowundo_rows(part)))
    assert KnowundoEvaluation(model=model, data=str(folder)).rows()["unlearn"] == knowundo_rows("unlearn")
    with pytest.raises(UserError, match="no copyright/unlearn"):
        KnowundoEvaluation(model=model, data=str(folder), domain="copyright").data_digest()
    (folder / "privacy" / "unlearn_val.json").write_text(json.dumps([{"text": "Who?", "label": "Ada"}]))
    with pytest.raises(UserError, match=r"no 'labels'; it has text, label.*Did you mean|no 'labels'"):
        KnowundoEvaluation(model=model, data=str(folder)).data_digest()
    nested = knowundo_folder(tmp_path / "nested")
    (nested / "privacy" / "unlearn.json").write_text(json.dumps([{"train": knowundo_rows("unlearn")}]))
    with pytest.raises(UserError, match="has no val; it has train"):
        KnowundoEvaluation(model=model, data=str(nested)).data_digest()


def test_a_question_that_fills_what_counts_is_refused():
    with pytest.raises(UserError, match="nothing of its answer is within 256"):
        knowundo.encoded(byte_tokenizer(), {"text": "a" * 300, "labels": "b"})
    row = knowundo.encoded(byte_tokenizer(), {"text": "a" * 200, "labels": "b" * 100})
    assert len(row.input_ids) == 256
    assert row.labels.count(-100) == 200


def test_a_cut_reply_ends_before_its_stop():
    assert replies.cut_reply("Perm\nand more", ("\n",)) == "Perm"
