"""A book to forget: passages, BLEU, ROUGE-L and ASG against plain loops, the paper's own rows, and what is refused."""

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import processors

import reference
from alter import metrics
from alter.cli import main
from alter.core.errors import UserError
from alter.data.rows import load_examples
from alter.evaluation import book, passages
from alter.inference.scoring import Scores
from alter.storage.records import read_records, write_records
from pico import EOS, byte_tokenizer, pico, save_pico

# the paper's Harry Potter table (Llama2-7B): BLEU, ROUGE-L, ASG, in points
RETAIN = (1.9, 9.8)
PAPER = {
    "Original": (74.8, 85.1, 74.1),
    "Fine-tune": (6.4, 17.2, 5.9),
    "GA": (0, 0, 6.0),
    "GD": (3.9, 14.5, 3.4),
    "NPO": (1.5, 5.3, 2.5),
    "KL": (1.2, 8.9, 0.8),
    "WHP": (23.6, 17.9, 14.9),
    "ELM": (8.1, 9.0, 2.7),
    "LoRA": (7.2, 11.5, 3.5),
    "AsymLoRA": (5.9, 10.4, 1.9),
    "ALTER": (4.7, 9.6, 1.3),
}
WORDS = ["the", "a", "rabbit,", "hole;", "cat's", "deep", "well-lit", "said", "Alice.", "1865", "(or)", "why?", "down"]


def prose(seed, words):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, size=words))


@pytest.fixture
def books(tmp_path):
    """Three texts in ASCII, so that a token of the byte tokenizer is a character."""
    for seed, (name, words) in enumerate({"alice": 40, "glass": 33, "pan": 47, "oz": 21}.items()):
        (tmp_path / f"{name}.txt").write_text(prose(seed, words))
    return tmp_path


def settings(folder, **other):
    return book.BookEvaluation(
        **{"model": "unused", "book": f"{folder}/alice.txt", "prefix_tokens": 20, "continuation_tokens": 30} | other
    )


def by_metric(records):
    return {record.metric: record for record in records}


# ---- ASG: the paper's rows


def test_asg_of_the_papers_rows():
    """The signed form explains nine of the eleven rows, the absolute one seven, and neither explains GA and AsymLoRA."""
    explained = {True: set(), False: set()}
    for name, (bleu, rouge, reported) in PAPER.items():
        for signed in (True, False):
            # the paper prints one decimal
            if abs(metrics.text.asg((bleu, rouge), RETAIN, signed=signed) - reported) <= 0.05 + 1e-9:
                explained[signed].add(name)
    assert explained[True] == set(PAPER) - {"GA", "AsymLoRA"}
    assert explained[False] == explained[True] - {"ELM", "ALTER"}
    assert metrics.text.asg((0, 0), RETAIN) == metrics.text.asg((0, 0), RETAIN, signed=True) == pytest.approx(5.85)
    assert (
        metrics.text.asg((5.9, 10.4), RETAIN)
        == metrics.text.asg((5.9, 10.4), RETAIN, signed=True)
        == pytest.approx(2.3)
    )
    # gaps of opposite sign cancel
    assert metrics.text.asg((4.7, 9.6), RETAIN) == pytest.approx(1.5)
    assert metrics.text.asg((4.7, 9.6), RETAIN, signed=True) == pytest.approx(1.3)


def test_asg_is_a_mean_of_gaps():
    rng = np.random.default_rng(0)
    for k in (1, 2, 5):
        a, b = rng.normal(size=k), rng.normal(size=k)
        assert metrics.text.asg(a, b) == pytest.approx(math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / k)
        assert metrics.text.asg(a, b, signed=True) == pytest.approx(abs(math.fsum(a) - math.fsum(b)) / k)
    for bad in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="ASG"):
            metrics.text.asg(*bad)


# ---- BLEU and ROUGE


def naive_tokens(text):
    """sacrebleu's 13a for these words: punctuation stands alone, but a period or comma inside a number does not."""
    return re.sub(r"([^\w\s'-])", r" \1 ", text).split()


def naive_bleu(pairs):
    """BLEU of (reference, generation) pairs as one corpus, exponential smoothing: Papineni et al. 2002, Chen and Cherry."""
    right, total = [0] * 4, [0] * 4
    length_said = length_true = 0
    for true, said in pairs:
        a, b = naive_tokens(true), naive_tokens(said)
        length_true, length_said = length_true + len(a), length_said + len(b)
        for n in range(1, 5):
            known = Counter(tuple(a[i : i + n]) for i in range(len(a) - n + 1))
            found = Counter(tuple(b[i : i + n]) for i in range(len(b) - n + 1))
            right[n - 1] += sum(min(count, known[gram]) for gram, count in found.items())
            total[n - 1] += sum(found.values())
    if not all(total) or not any(right):
        return 0.0
    product, halved = 1.0, 1.0
    for r, t in zip(right, total, strict=True):
        if r == 0:
            halved *= 2
        product *= (r or 1 / halved) / t
    shortness = 1.0 if length_said >= length_true else math.exp(1 - length_true / length_said)
    return 100 * shortness * product**0.25


def test_bleu_per_passage_and_of_the_corpus():
    references = [prose(i, 12 + i) for i in range(6)] + ["a very deep hole and slowly down", "cat's", "", "the cat"]
    generations = [prose(100 + i, 5 + 3 * i) for i in range(6)] + [
        "a very deep hole and slowly down",
        "cat's",
        "x y z w",
        "",
    ]
    generations[2] = f"{references[2]} and (or) why?"
    each = metrics.text.bleu(references, generations)
    pairs = list(zip(references, generations, strict=True))
    np.testing.assert_allclose(each, [naive_bleu([pair]) for pair in pairs], rtol=1e-9)
    np.testing.assert_array_equal(each, [sacrebleu.corpus_bleu([g], [[r]]).score for r, g in pairs])
    assert each[6] == pytest.approx(100)
    # fewer than four tokens, or an empty side
    assert each[7:].tolist() == [0, 0, 0]
    whole = metrics.text.corpus_bleu(references, generations)
    assert whole == pytest.approx(naive_bleu(pairs), rel=1e-9)
    assert whole == sacrebleu.corpus_bleu(generations, [references]).score
    assert abs(whole - each.mean()) > 1


def test_bleu_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        metrics.text.bleu(["a", "b"], ["a"])
    for pair in ((["a"], []), ([], [])):
        with pytest.raises(ValueError, match="corpus BLEU"):
            metrics.text.corpus_bleu(*pair)


# ---- passages


def with_beginning(tokenizer, *, end=False):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<unused258> $A{' <eos>' if end else ''}",
        special_tokens=[("<unused258>", 258), ("<eos>", EOS)],
    )
    return tokenizer


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (byte_tokenizer, []),
        (lambda: with_beginning(byte_tokenizer()), [258]),
        (lambda: with_beginning(byte_tokenizer(), end=True), [258]),
    ],
)
@pytest.mark.parametrize(("prefix", "continuation"), [(7, 5), (1, 1), (20, 30), (13, 64)])
def test_passages_are_consecutive_windows(make, start, prefix, continuation):
    text, tokenizer = prose(0, 33), make()
    alphabet = byte_tokenizer()
    found = passages.cut(tokenizer, text, prefix, continuation, "book")
    place = number = 0
    while place + prefix + continuation <= len(text):
        head = text[place : place + prefix]
        tail = text[place + prefix : place + prefix + continuation]
        passage = found[number]
        assert passage.prompt == start + [alphabet.convert_tokens_to_ids(c.replace(" ", "Ġ")) for c in head]
        assert passage.continuation == [alphabet.convert_tokens_to_ids(c.replace(" ", "Ġ")) for c in tail]
        assert (passage.prefix, passage.reference) == (head.strip(), tail.strip())
        place, number = place + prefix + continuation, number + 1
    assert len(found) == number > 0


def test_fingerprint_is_of_the_text():
    text = prose(0, 33)
    plain = passages.passages_fingerprint(passages.cut(byte_tokenizer(), text, 9, 5, "book"))
    assert plain == passages.passages_fingerprint(passages.cut(with_beginning(byte_tokenizer()), text, 9, 5, "book"))
    others = [(text, 5, 9), (text, 9, 6), (text.replace("a", "b", 1), 9, 5), (text[14:], 9, 5)]
    assert (
        len(
            {
                plain,
                *(passages.passages_fingerprint(passages.cut(byte_tokenizer(), *other, "book")) for other in others),
            }
        )
        == 5
    )


def test_a_pattern_of_names_reads_several_books(books, monkeypatch):
    rows = load_examples(f"{books}/[a-g]*.txt")
    assert [row.answer for row in rows] == [(books / f"{name}.txt").read_text() for name in ("alice", "glass")]
    assert len(load_examples(f"{books}/*.txt")) == 4
    monkeypatch.setattr(Path, "glob", lambda self, name: iter([self / "glass.txt", self / "alice.txt"]))
    assert [row.answer for row in load_examples(f"{books}/[a-g]*.txt")] == [row.answer for row in rows]
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"No file matches .*\[x\]"):
        load_examples(f"{books}/[x].txt")


# ---- one model, against a plain loop


def naive_greedy(model, prompt, steps):
    ids, said = list(prompt), []
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == EOS:
            break
        ids.append(token)
        said.append(token)
    return said


@pytest.mark.parametrize("beginning", [False, True])
def test_every_figure_is_that_of_a_plain_loop(books, beginning, capsys):
    model, double = pico(), pico().double()
    tokenizer = with_beginning(byte_tokenizer()) if beginning else byte_tokenizer()
    run = settings(
        books,
        holdout=f"{books}/glass.txt",
        retain=[f"{books}/pan.txt", f"{books}/oz.txt"],
        batch_size=3,
        batch_tokens=120,
    )
    found = by_metric(run.measure(model, tokenizer))
    start = [258] if beginning else []
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    min_k = {}
    for name in ("alice", "glass", "pan", "oz"):
        text = (books / f"{name}.txt").read_text()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows = [ids[i : i + 50] for i in range(0, len(ids) - 49, 50)]
        logps, right, bleu, rouge, said = [], [], [], [], []
        for row in rows:
            with torch.no_grad():
                logits = double(input_ids=torch.tensor([start + row])).logits[0, len(start) + 19 : -1]
            labels = torch.tensor(row[20:])
            logps.append(logits.log_softmax(1)[range(30), labels].tolist())
            right.append((logits.argmax(1) == labels).tolist())
            if name in ("alice", "glass"):
                tokens = naive_greedy(model, start + row[:20], 30)
                said.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
                true = text[50 * len(said) - 30 : 50 * len(said)].strip()
                bleu.append(sacrebleu.corpus_bleu([said[-1]], [[true]]).score)
                rouge.append(scorer.score(true, said[-1])["rougeL"].recall)
        losses = [reference.naive_loss(row) for row in logps]
        min_k[name] = [reference.naive_min_k(row, 0.4) for row in logps]
        if name == "pan":
            kept, kept_right = losses, right
            continue
        if name == "oz":
            losses, right = kept + losses, kept_right + right
        perplexity = math.exp(math.fsum(losses) / len(losses))
        prefix = {"alice": "book", "glass": "holdout", "oz": "retain"}[name]
        assert found[f"{prefix}_perplexity"].value == pytest.approx(perplexity, rel=1e-5)
        assert found[f"{prefix}_perplexity"].n == len(losses)
        if name == "oz":
            accuracy = np.mean([np.mean(row) for row in right])
            assert found["retain_accuracy"].value == pytest.approx(accuracy)
            continue
        assert found[f"{prefix}_bleu"].per_item == pytest.approx(bleu)
        assert found[f"{prefix}_rouge"].per_item == pytest.approx(rouge)
        assert found[f"{prefix}_bleu"].extra["generations"] == said
        assert found[f"{prefix}_perplexity"].per_item == pytest.approx([math.exp(x) for x in losses], rel=1e-5)
        if name == "alice":
            assert found["book_exact_memorization"].per_item == pytest.approx([np.mean(row) for row in right])
            strengths = [reference.naive_extraction_strength([*row, True], False) for row in right]
            assert found["book_extraction_strength"].per_item == pytest.approx(strengths)
            assert found["book_distinct_2"].value == metrics.text.distinct_n(said, 2)
            assert found["book_repetition"].per_item == pytest.approx(metrics.text.repetition(said))
            assert found["book_bleu"].extra["references"] == [
                text[i + 20 : i + 50].strip() for i in range(0, 50 * len(said), 50)
            ]
    assert found["mia_min_k"].value == pytest.approx(reference.naive_auc(min_k["alice"], min_k["glass"]))
    assert not {"book_asg", "book_asg_signed", "privleak"} & set(found)
    assert "alter evaluate --model RETRAINED --benchmark book" in capsys.readouterr().err


def test_a_model_that_knows_the_book(books, monkeypatch):
    """BLEU 100, ROUGE 1; a completion that is empty scores 0 and is said."""
    model, tokenizer = pico(), byte_tokenizer()
    text = (books / "alice.txt").read_text()
    true = [text[i + 20 : i + 50].strip() for i in range(0, len(text) - 49, 50)]
    monkeypatch.setattr(book, "generate", lambda *args, **kwargs: ["", *true[1:]])
    told = []
    monkeypatch.setattr(book, "say", told.extend)
    found = by_metric(settings(books).measure(model, tokenizer))
    assert found["book_bleu"].per_item == pytest.approx([0, *[100] * (len(true) - 1)])
    assert found["book_rouge"].per_item == [0, *[1] * (len(true) - 1)]
    assert found["book_bleu"].higher_is_better is False
    assert told[-1].startswith(f"1 of {len(true)} completions are empty; they count 0")


def test_the_last_token_of_a_passage_counts(books):
    """It is text like the others, where the last token of an answer is its end."""
    rows = [[True, True, False], [False, False, True], [False, True, True]]
    scores = Scores([np.full(3, -0.5)] * 3, [np.array(row) for row in rows])
    passage = book.Passage([1], [2, 3, 4], "a", "b")
    result = book.BookResult("", [passage] * 3, scores, ["b"] * 3, retain_scores=scores)
    found = by_metric(settings(books)._records(result, None))
    assert found["book_exact_memorization"].per_item == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert found["retain_accuracy"].value == pytest.approx(5 / 9)
    assert found["book_extraction_strength"].per_item == pytest.approx([0, 1 / 3, 2 / 3])


def test_limit_draws_the_same_passages(books):
    tokenizer = byte_tokenizer()
    every = settings(books)._passages(tokenizer, f"{books}/alice.txt")
    drawn = [settings(books, limit=3, seed=seed)._passages(tokenizer, f"{books}/alice.txt") for seed in (*range(9), 0)]
    assert drawn[0] == drawn[-1]
    assert any(some != drawn[0] for some in drawn)
    for some in drawn:
        assert len(some) == 3 < len(every)
        assert [p for p in every if p in some] == some
    assert settings(books, limit=99)._passages(tokenizer, f"{books}/alice.txt") == every


# ---- from the command line, with a retrained model


def test_evaluate_beside_a_retrained_model(books, tmp_path, capsys):
    save_pico(tmp_path / "model")
    save_pico(tmp_path / "twin", seed=1)
    common = ["--benchmark", "book", "--book", f"{books}/alice.txt", "--holdout", f"{books}/glass.txt"]
    common += ["--prefix-tokens", "20", "--continuation-tokens", "30"]
    file = tmp_path / "twin.json"
    assert main(["evaluate", "--model", str(tmp_path / "twin"), *common, "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert f"--benchmark book {' '.join(common[2:])} --json retrained.json" in " ".join(shown.err.split())
    assert "book_asg" not in shown.out
    twin = by_metric(read_records(file))
    results = []
    for source in (file, tmp_path / "twin"):
        out = tmp_path / "out.json"
        args = ["evaluate", "--model", str(tmp_path / "model"), *common, "--retain-records", str(source)]
        assert main([*args, "--retain", f"{books}/pan.txt", "--json", str(out)]) == 0
        assert "book_asg" in capsys.readouterr().out
        results.append(by_metric(read_records(out)))
    own = results[0]
    gaps = [
        own["book_bleu"].value - twin["book_bleu"].value,
        100 * (own["book_rouge"].value - twin["book_rouge"].value),
    ]
    assert own["book_asg"].value == pytest.approx(np.abs(gaps).mean())
    assert list(own["book_asg"].extra["gaps"].values()) == pytest.approx(gaps)
    auc, other = own["mia_min_k"].value, twin["mia_min_k"].value
    assert auc != other
    assert own["privleak"].value == pytest.approx((other - auc) / (1 - other) * 100)
    for name in ("book_asg", "privleak"):
        assert results[0][name].value == pytest.approx(results[1][name].value)
    assert main([*args, "--signed", "--json", str(out)]) == 0
    signed = by_metric(read_records(out))
    assert signed["book_asg_signed"].value == pytest.approx(abs(np.mean(gaps)))
    assert "book_asg" not in signed
    # a model is no gap away from itself
    assert (
        main(
            ["evaluate", "--model", str(tmp_path / "twin"), *common, "--retain-records", str(file), "--json", str(out)]
        )
        == 0
    )
    same = by_metric(read_records(out))
    assert (same["book_asg"].value, same["privleak"].value) == (0, 0)


def refused(capsys, *args):
    assert main(["evaluate", "--benchmark", "book", *map(str, args)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("alter: ") == 1
    return error


def test_what_is_no_book_is_refused_before_the_model_is_looked_at(books, capsys):
    none = ("--model", books / "nowhere")
    assert "Did you mean" in refused(capsys, *none, "--book", books / "alise.txt")
    assert "expected a book as plain text" in refused(capsys, *none, "--book", books)
    (books / "empty.txt").write_text(" \n")
    assert "is empty" in refused(capsys, *none, "--book", books / "empty.txt")
    (books / "latin.txt").write_bytes("Schrödinger".encode("latin-1"))
    assert "not UTF-8" in refused(capsys, *none, "--book", books / "alice.txt", "--retain", books / "latin.txt")
    alice = ("--book", books / "alice.txt")
    assert "are the same text" in refused(capsys, *none, *alice, "--holdout", books / "alice.txt")
    assert "are the same text" in refused(capsys, *none, *alice, "--retain", books / "pan.txt", books / "pan.txt")
    assert "No result file" in refused(capsys, *none, *alice, "--retain-records", books / "none.json")
    assert "--prefix-tokens: " in refused(capsys, *none, *alice, "--prefix-tokens", "0")


def test_passages_that_do_not_fit_are_refused(books, tmp_path, capsys):
    save_pico(tmp_path / "model")
    given = ("--model", tmp_path / "model", "--book", books / "alice.txt")
    error = refused(capsys, *given)
    assert "fewer than one passage of 200 + 400" in error
    error = refused(capsys, *given, "--prefix-tokens", "100", "--continuation-tokens", "29")
    assert "A passage has 129 tokens (100 + 29" in error
    assert "context is 128" in error


def test_a_reference_of_something_else_is_refused_by_name(books, tmp_path, capsys):
    save_pico(tmp_path / "model")
    model, tokenizer = pico(), byte_tokenizer()
    file = tmp_path / "twin.json"
    given = ("--model", tmp_path / "model", "--book", books / "alice.txt", "--prefix-tokens", "20")
    given += ("--continuation-tokens", "30", "--retain-records", file)

    def write(records):
        write_records(file, records)

    other = settings(books, book=f"{books}/pan.txt").measure(model, tokenizer)
    write(other)
    error = refused(capsys, *given)
    assert "pan.txt" in error
    assert "on another book" in error
    assert "alter evaluate --model RETRAINED --benchmark book --book" in error
    write(settings(books, prefix_tokens=19, continuation_tokens=31).measure(model, tokenizer))
    assert "on other passages of" in refused(capsys, *given)
    write(settings(books, limit=3).measure(model, tokenizer))
    assert "on other passages of" in refused(capsys, *given)
    good = settings(books).measure(model, tokenizer)
    write([*good, *(dataclasses.replace(record, model="second") for record in good)])
    assert "2 records of book_bleu" in refused(capsys, *given)
    write([record for record in good if record.metric != "book_rouge"])
    assert "0 of book_rouge" in refused(capsys, *given)
    write([dataclasses.replace(record, value=math.nan) for record in good])
    assert "no value of book_bleu" in refused(capsys, *given)
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([row | {"version": 99} for row in rows]))
    assert "version 99" in refused(capsys, *given)
    # a reference with another holdout, or none, gives ASG but no PrivLeak
    for holdout in (None, f"{books}/pan.txt"):
        write(settings(books, holdout=holdout).measure(model, tokenizer))
        capsys.readouterr()
        assert main(["evaluate", "--benchmark", "book", *map(str, given), "--holdout", str(books / "glass.txt")]) == 0
        shown = capsys.readouterr()
        assert "No privleak" in shown.err
        assert "book_asg" in shown.out
        assert "privleak" not in shown.out


def test_a_retrained_model_that_tells_the_books_apart(books, monkeypatch):
    told = []
    monkeypatch.setattr(book, "say", told.extend)
    run = settings(books, holdout=f"{books}/glass.txt")
    result = run.result(pico(), byte_tokenizer())
    twin = dataclasses.replace(result.as_reference("twin"), min_k_auc=1.0)
    assert "privleak" not in by_metric(run._records(result, twin))
    assert told == ["No privleak: the retrained model tells book and holdout apart as well (mia_min_k 1)."]


def test_the_digest_is_of_the_contents(books, tmp_path):
    save_pico(tmp_path / "twin")
    plain = settings(books).data_digest()
    assert plain == settings(books).data_digest()
    copy = tmp_path / "copy.txt"
    copy.write_text((books / "alice.txt").read_text())
    assert settings(books, book=str(copy)).data_digest() == plain
    changed = {plain}
    changed.add(settings(books, holdout=f"{books}/glass.txt").data_digest())
    changed.add(settings(books, retain_records=str(tmp_path / "twin")).data_digest())
    copy.write_text((books / "alice.txt").read_text() + "!")
    changed.add(settings(books, book=str(copy)).data_digest())
    assert len(changed) == 4
