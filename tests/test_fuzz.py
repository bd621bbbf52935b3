"""Whatever a file, a recipe or a flag holds, alter does it or says in one line why not: no other error, no endless run.

Inputs come from hypothesis, always the same ones; those that broke something once are kept as examples.
"""

import contextlib
import json
import string

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from alter.cli import parse
from alter.core.errors import UserError
from alter.data.encoding import encode_all
from alter.data.rows import check_overlap, load_examples
from alter.data.subjects import rows_about
from alter.evaluation.measures import Measures
from alter.evaluation.others import people
from alter.evaluation.verdict import judge
from alter.requests.records import check_due, parse_id
from alter.requests.store import Store
from alter.storage.files import from_json, to_csv, to_json
from alter.storage.records import read_records
from alter.training.settings import Unlearn
from pico import byte_tokenizer

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "\x00", "\ud800", "\u2028", "=1+1", "[/]", "[bold]", "</s>", "<eos>", "null", "²", "١", "\x1b[2J"]
    ),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from([2**70, -(2**70), 1e-45, 1e308])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
COLUMNS = ["question", "answer", "text", "messages", "prompt", "completion", "conversations", "instruction", "output"]
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "", None, 3])
TURNS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": ROLES, "content": VALUES, "from": ROLES, "value": VALUES, "tool_calls": VALUES}
    ),
    max_size=4,
)
ROWS = st.one_of(
    st.dictionaries(st.sampled_from([*COLUMNS, "who"]), VALUES | TURNS, max_size=4),
    st.fixed_dictionaries({"question": TEXTS, "answer": TEXTS}),
    st.fixed_dictionaries({"messages": TURNS}),
    VALUES,
)
TOKENIZER = byte_tokenizer()


def done_or_refused(action, *args):
    """What an action gives; None where it refuses, in words."""
    try:
        return action(*args)
    except UserError as error:
        if not str(error).strip():
            raise
        return None


def used(path):
    """All that a run does with rows before it loads a model."""
    found = load_examples(str(path), domain_column=None)
    check_overlap(found, found[:0])
    rows_about("Ilse Brandt", found)
    people(row.prompt for row in found if row.prompt is not None)
    encode_all(TOKENIZER, found, max_length=64, label="rows")
    # what is kept of a row gives the same row again
    for row in found:
        json.dumps(row.row, default=str)


@FEW
@given(
    content=st.binary(max_size=200),
    ending=st.sampled_from(["json", "jsonl", "csv", "txt", "md", "parquet", "yaml", ""]),
)
@example(content=b"\xff\xfe[", ending="json")
@example(content=b'{"question": "\\ud800", "answer": "x"}', ending="jsonl")
@example(content=b"[" * 100_000, ending="json")
@example(content=b'[{"text": ' + b"9" * 5000 + b"}]", ending="json")
@example(content=b"PAR1\x00\x00\x00\x00PAR1", ending="parquet")
@example(content=b'question,answer\n"a,b\n', ending="csv")
def test_any_bytes_as_rows(tmp_path, content, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    done_or_refused(used, path)


@FEW
@given(rows=st.lists(ROWS, max_size=3), lines=st.booleans())
@example(rows=[{"messages": [{"role": "assistant", "content": [None, {"type": "text"}]}]}], lines=True)
@example(rows=[{"question": {"a": 1}, "answer": ["x"]}], lines=False)
def test_any_json_as_rows(tmp_path, rows, lines):
    path = tmp_path / "rows.jsonl"
    content = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows)
    path.write_text(content)
    done_or_refused(used, path)


NAMES = sorted(Unlearn.model_fields)


@FEW
@given(
    recipe=st.one_of(
        VALUES,
        st.dictionaries(st.sampled_from([*NAMES, "objectve", ""]), VALUES, max_size=4),
        st.dictionaries(
            st.sampled_from(["adapter", "objective", "watch", "router_fit"]),
            st.dictionaries(st.sampled_from(["kind", "r", "hinge", "every_steps", "steps"]), VALUES, max_size=3),
            max_size=3,
        ),
    ),
    flag=st.sampled_from(NAMES),
    value=TEXTS,
)
@example(recipe={"epochs": float("inf")}, flag="seed", value="²")
@example(recipe={"max_steps": 10**30}, flag="out", value="\x00")
@example(recipe={"adapter": ["kind"]}, flag="adapter", value="")
@example(recipe=None, flag="retain", value="-")
def test_any_recipe_and_flag(tmp_path, recipe, flag, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=False))
    # a flag that tyro refuses ends the process, with its usage on stderr
    with contextlib.suppress(SystemExit):
        done_or_refused(parse, "unlearn", Unlearn, [str(path), f"--{flag.replace('_', '-')}", value])


@FEW
@given(content=st.one_of(st.text(max_size=100), VALUES.map(json.dumps)))
@example(content="[" * 100_000)
@example(content='[{"model": "m", "metric": "x", "value": "y", "n": 1}]')
@example(content='{"records": [null]}')
def test_any_text_as_records(tmp_path, content):
    path = tmp_path / "records.json"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    done_or_refused(read_records, path)


@FEW
@given(text=st.one_of(TEXTS, st.text(string.digits + "-rR²١ ", max_size=40)))
@example(text="²")
@example(text="9" * 30)
@example(text="2026-02-30")
def test_any_text_as_an_id_or_a_date(text):
    for function in (parse_id, check_due):
        done_or_refused(function, text)


@FEW
@given(subject=TEXTS, who=TEXTS, due=TEXTS)
@example(subject="Robert'); DROP TABLE alter_requests;--", who="\x00", due="")
def test_any_text_in_a_request(tmp_path_factory, subject, who, due):
    store = Store.create(f"sqlite:///{tmp_path_factory.mktemp('db')}/r.db", {"model": subject})
    given = {"subject": subject, "data": who, "due": due, "text": subject, "who": who}
    if any("\ud800" <= c <= "\udfff" for text in given.values() for c in text):
        # half a character, which the command line refuses before
        return
    store.add(**given, data_hash="h", row_hashes=["h"])
    found = store.requests()[0]
    assert (found.subject, found.data, found.due) == (subject, who, due)
    assert store.check_chain() == []


@FEW
@given(text=st.text(max_size=60))
def test_json_is_read_or_refused(text):
    try:
        value = from_json(text)
    except ValueError:
        return
    to_json(value).encode()


@FEW
@given(rows=st.lists(st.lists(SCALARS, max_size=4), max_size=4))
def test_no_cell_begins_as_a_formula(rows):
    for line in to_csv([[f"{cell}" for cell in row] for row in rows]).split("\n"):
        assert not line.lstrip('"').startswith(("=", "+", "@"))


@FEW
@given(
    p=st.lists(st.tuples(*[st.floats(0, 1)] * 2), min_size=1, max_size=6),
    replies=st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS), max_size=6),
)
def test_a_verdict_has_a_word_and_a_reason(p, replies):
    asked, truths, was, now = zip(*replies, strict=True) if replies else ((),) * 4
    before, after = (
        Measures.of([a for a, _ in p], asked, truths, was),
        Measures.of([b for _, b in p], asked, truths, now),
    )
    found = judge(before, after)
    assert found.word in ("forgotten", "not forgotten", "collapsed", "unproven")
    assert all(why.strip() for why in found.why)
    # what has not changed was not forgotten
    assert judge(before, before).word in ("not forgotten", "collapsed", "unproven")
