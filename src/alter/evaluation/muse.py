"""MUSE (Shi et al. 2024, arXiv:2407.06460), on News and Books: six criteria, by the protocol of its authors' code.

| criterion             | figure           | rows                     | how it is measured                                    |
|-----------------------|------------------|--------------------------|-------------------------------------------------------|
| C1 verbatim           | `verbmem`        | verbmem/forget           | ROUGE-L F1 of 128 greedy tokens after the prompt      |
| C2 knowledge          | `knowmem_forget` | knowmem/forget_qa (_icl) | ROUGE-L F1 of a reply of at most 32 tokens, few shots |
| C3 privacy            | `privleak`       | privleak/forget, holdout | AUC of Min-40 %, against the retrained model's        |
| C4 utility            | `knowmem_retain` | knowmem/retain_qa (_icl) | as C2                                                 |
| C5 scal., C6 sustain. | all of them      | the same                 | of models that forgot more and more: `muse_curve`     |

ROUGE is a share of 1 here (MUSE prints percent) and has no stemmer; a reply that says nothing scores 0. The reference
of VerbMem is what the first 128 tokens of the true text say, special tokens of the tokenizer counted.

PrivLeak's sign: MUSE labels the holdout as members and takes high loss for unseen, so its AUC is 1 minus ours
(`metrics.membership.auc`: 1, forgotten rows are still known). PrivLeak is the same number: (AUC_u - AUC_r) / AUC_r in percent with
MUSE's AUC is `metrics.membership.privleak` with ours. -100 is no forgetting, positive is over-forgetting. Min-40 % is over all
tokens of the raw text but the first, which nothing predicts.

Layout of the data: configurations and splits as on the hub (`muse-bench/MUSE-News`, `muse-bench/MUSE-Books`); locally
FOLDER/CONFIGURATION/SPLIT.json, .jsonl or .parquet (see `alter.data.hub.muse_rows`), which is also what MUSE's own code
reads. Columns: `prompt`, `gt` (verbmem), `question`, `answer` (knowmem), `text` (privleak).

Long texts: MUSE cuts nothing, so a prompt or a text that exceeds the model's context is refused. `max_length` cuts the
texts of PrivLeak, and only them, to their first tokens; how many were cut is in the record.

`mode="compat"` is OpenUnlearning (Dorna et al. 2025), with its template for MUSE's Llama-2-7b. The differences, all:

| | strict (MUSE) | compat (OpenUnlearning) |
|---|---|---|
| ROUGE                    | without stemmer         | Porter stemmer                                              |
| reference of VerbMem     | first 128 tokens        | up to 2048 tokens                                           |
| few-shot prompt + answer | any length              | at most 512 tokens; it cuts the rest, we refuse to          |
| texts of PrivLeak        | whole                   | first 2048 tokens                                           |
| Min-40 %                 | all tokens              | without the last, as if it were an end token                |
| without reference        | PrivLeak is refused     | AUC of 0.5 is taken, which is said; 1e-10 in the denominator|
| pad tokens               | masked by length        | every token equal to the pad token is hidden                |

Both of them load models in 8 bit or bf16 by default; here it is `dtype`. Replies are decoded without the clean-up of
spaces that both ask for (transformers no longer does it for BPE): it changes ROUGE's words in a detached "n't" only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from alter import metrics
from alter.core import UserError
from alter.data import MUSE_HUB, Encoded, Row, ensure_pad_token, muse_rows
from alter.evaluation.base import Evaluation, quick_look, say
from alter.evaluation.figures import metric_record
from alter.evaluation.musereference import (
    MuseReference,
    PrivacySettings,
    how_to_make_a_reference,
    is_model,
    read_muse_reference,
    usable,
)
from alter.evaluation.replies import CutReplies, open_ids, required, sampled
from alter.inference import check_prompts, check_rows, generate, score
from alter.models import ModelSettings
from alter.settings import Tokens
from alter.storage import Record, cache_folder, digest

Criterion = Literal["verbmem", "knowmem_forget", "privleak", "knowmem_retain"]
SPLITS: dict[Criterion, tuple[str, ...]] = {
    "verbmem": ("verbmem/forget",),
    "knowmem_forget": ("knowmem/forget_qa", "knowmem/forget_qa_icl"),
    "privleak": ("privleak/forget", "privleak/holdout"),
    "knowmem_retain": ("knowmem/retain_qa", "knowmem/retain_qa_icl"),
}
"""Which splits a criterion reads; of the questions, those asked come first and the shots second."""
COLUMNS = {"verbmem": ("prompt", "gt"), "knowmem": ("question", "answer"), "privleak": ("text",)}
VERBMEM_TOKENS = 128
KNOWMEM_TOKENS = 32
STOPS = ("\n\n", "\nQuestion", "Question:")
"""A reply to a question ends before the first of these."""
COMPAT_TEXT = 2048
"""OpenUnlearning's longest text, VerbMem's reference included, in tokens."""
COMPAT_QUESTION = 512
"""OpenUnlearning's longest few-shot prompt with its answer, in tokens."""


# Prompts and replies -------------------------------------------------------------------------------------------------


def few_shot_prompt(question: str, shots: Sequence[Row]) -> str:
    r"""Return MUSE's prompt: "Question: ...\nAnswer: ...\n\n" for each shot, then the question and "Answer: "."""
    head = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
    return f"{head}Question: {question}\nAnswer: "


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])


def _continuation(tokenizer: Any, row: Row, compat: bool) -> str:
    """Return VerbMem's reference text: the beginning of the true continuation."""
    if not compat:
        return str(tokenizer.decode(_ids(tokenizer, row["gt"])[:VERBMEM_TOKENS], skip_special_tokens=True)).strip()
    start = len(_ids(tokenizer, row["prompt"]))
    ids = _ids(tokenizer, f"{row['prompt']} {row['gt']}")[start : start + COMPAT_TEXT]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _encode_text(tokenizer: Any, text: str, max_length: int | None) -> Encoded:
    """Return a raw text, all of it labelled but the first token; cut to its first `max_length` tokens, BOS aside."""
    ids = _ids(tokenizer, text)
    if max_length is not None:
        ids = ids[: len(_ids(tokenizer, "")) + max_length]
    return Encoded(ids, [-100, *ids[1:]], 1)


# Data ----------------------------------------------------------------------------------------------------------------


def _checked(split: str, data: str) -> list[Row]:
    """Return the rows of a split, with the columns that are needed and only those."""
    return required(muse_rows(split, data), COLUMNS[split.partition("/")[0]], split, data)


def _fingerprint(*sets: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(sets, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:12]


# The benchmark -------------------------------------------------------------------------------------------------------


class MuseEvaluation(Evaluation):
    """Measure a model on MUSE: verbatim and knowledge memorisation, privacy leakage, utility."""

    benchmark: Literal["muse"] = "muse"
    """What to measure on."""
    corpus: Literal["news", "books"]
    """Which of MUSE's corpora; it says what is loaded from the hub and how records are labelled."""
    data: str | None = None
    """MUSE's rows: a folder of its layout (CONFIGURATION/SPLIT.json, ...) or a hub id; by default the corpus's own."""
    mode: Literal["strict", "compat"] = "strict"
    """MUSE's own protocol, or OpenUnlearning's of the same benchmark, to compare with its numbers."""
    criteria: list[Criterion] = Field(default_factory=lambda: list(SPLITS), min_length=1)
    """What to measure; all four by default."""
    retain_records: str | None = None
    """The model retrained without the forgotten texts: its result file (`json_path`), its folder, or "published". Gives
    PrivLeak; "published" is the AUC in MUSE's code, for its own data and Llama-2-7b."""
    max_length: Tokens | None = Field(None, ge=2)
    """Cut the texts of PrivLeak to this many tokens; by default whole, in compat mode 2048."""

    @property
    def source(self) -> str:
        """Source of the rows."""
        return self.data or MUSE_HUB[self.corpus]

    @property
    def compat(self) -> bool:
        """Whether OpenUnlearning's variant is measured."""
        return self.mode == "compat"

    @property
    def text_length(self) -> int | None:
        """Most tokens of a PrivLeak text; None: all."""
        return COMPAT_TEXT if self.compat and self.max_length is None else self.max_length

    def title(self) -> str:
        """Return the heading of the table."""
        return f"MUSE {self.corpus}" + ("" if self.data is None else f" ({self.data})")

    def rows(self) -> dict[str, list[Row]]:
        """Return the rows of every split that the chosen criteria read; a limit leaves the shots as they are.

        Raises:
            UserError: a split is missing, empty or has other columns.
        """
        splits = [split for criterion in SPLITS if criterion in self.criteria for split in SPLITS[criterion]]
        found = {split: _checked(split, self.source) for split in splits}
        return {k: v if k.endswith("_icl") else sampled(v, self.limit, self.seed) for k, v in found.items()}

    def data_digest(self) -> str | None:
        """Hash all rows and of the reference: the AUC that a file holds, or a model's weights."""
        found = self.rows()
        source = self.retain_records
        reference: Any = None
        if source is not None and "privleak" in self.criteria:
            if is_model(source):
                reference = ModelSettings(model=source).identity(cache_folder(self.cache))["weights"]
                if reference == "unknown":
                    return None
            else:
                known = self._reference(found)
                reference = None if known is None else known.auc
        return digest({split: _fingerprint(part) for split, part in found.items()}, reference)

    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        """Return MUSE's figures; report on stderr what could not be computed, with the remedy.

        Raises:
            UserError: data or a reference that do not fit, or a prompt or text that exceeds the model's context:
                all of this before anything is generated.
        """
        rows = self.rows()
        reference = None if is_model(self.retain_records) else self._reference(rows)
        ensure_pad_token(tokenizer)
        prompts = self._prompts(tokenizer, rows)
        for criterion, ids in prompts.items():
            new = VERBMEM_TOKENS if criterion == "verbmem" else KNOWMEM_TOKENS
            check_prompts(
                model, ids, new, [f"The prompt of {SPLITS[criterion][0]}, row {i}," for i in range(len(ids))]
            )
        texts = self._texts(tokenizer, rows)
        check_rows(model, [row for part in texts.values() for row in part], self._text_names(texts))
        if self.limit is not None:
            say([quick_look(self.limit)])
        if texts and is_model(self.retain_records):
            reference = self._measured(rows)
        records: list[Record] = []
        for criterion in SPLITS:
            if criterion in prompts:
                records.append(self._completions(model, tokenizer, criterion, prompts[criterion], rows))
            elif criterion == "privleak" and texts:
                records += self._privacy(model, tokenizer, texts, rows, reference)
        return records

    def _record(self, metric: str, value: float, n: int, items: Any = None, **extra: Any) -> Record:
        base = {"benchmark": "muse", "corpus": self.corpus, "data": self.source}
        return metric_record(self.label, metric, value, n, items, mode=self.mode, extra=base | extra)

    # C1, C2, C4

    def _prompts(self, tokenizer: Any, rows: dict[str, list[Row]]) -> dict[Criterion, list[list[int]]]:
        """Return the token ids of every prompt, by criterion."""
        prompts: dict[Criterion, list[list[int]]] = {}
        for criterion, splits in SPLITS.items():
            if criterion not in self.criteria or criterion == "privleak":
                continue
            asked = rows[splits[0]]
            if criterion == "verbmem":
                texts = [row["prompt"] for row in asked]
            else:
                texts = [few_shot_prompt(row["question"], rows[splits[1]]) for row in asked]
                for i, (text, row) in enumerate(zip(texts, asked, strict=True)):
                    length = len(_ids(tokenizer, text + row["answer"])) if self.compat else 0
                    if length > COMPAT_QUESTION:
                        raise UserError(
                            f"Row {i} of {splits[0]} has {length} tokens with its shots and its answer: OpenUnlearning "
                            f"would cut it after {COMPAT_QUESTION}, and the question or the answer with it. Use "
                            "`mode` strict, or fewer shots."
                        )
            prompts[criterion] = [open_ids(tokenizer, text) for text in texts]
        return prompts

    def _completions(
        self, model: Any, tokenizer: Any, criterion: Criterion, prompts: list[list[int]], rows: dict[str, list[Row]]
    ) -> Record:
        """Continue the prompts of one criterion and return the replies' ROUGE-L F1."""
        asked = rows[SPLITS[criterion][0]]
        verbatim = criterion == "verbmem"
        if verbatim:
            references = [_continuation(tokenizer, row, self.compat) for row in asked]
        else:
            references = [row["answer"] for row in asked]
        replies = generate(
            model,
            CutReplies(tokenizer, () if verbatim else STOPS),
            prompts,
            max_new_tokens=VERBMEM_TOKENS if verbatim else KNOWMEM_TOKENS,
            batch_size=self.batch_size,
            compat=self.compat,
            label=f"MUSE: {criterion}",
        )
        empty = sum(not reply for reply in replies)
        if empty:
            say([f"{criterion}: {empty} of {len(replies)} replies are empty; each scores 0."])
        rouge = metrics.text.rouge_l(references, replies, stem=self.compat).f1
        extra: dict[str, Any] = {"fingerprint": _fingerprint(*(rows[split] for split in SPLITS[criterion]))}
        if not verbatim:
            extra |= {"shots": len(rows[SPLITS[criterion][1]]), "questions": [row["question"] for row in asked]}
        extra |= {"references": references, "generations": replies, "empty": empty}
        return self._record(criterion, rouge.mean(), len(asked), rouge, **extra)

    # C3

    def _texts(self, tokenizer: Any, rows: dict[str, list[Row]]) -> dict[str, list[Encoded]]:
        """Return the encoded texts of PrivLeak, "forget" and "holdout"; empty if it is not asked for."""
        if "privleak" not in self.criteria:
            return {}
        return {
            key: [_encode_text(tokenizer, row["text"], self.text_length) for row in rows[f"privleak/{key}"]]
            for key in ("forget", "holdout")
        }

    def _text_names(self, texts: dict[str, list[Encoded]]) -> list[str]:
        hint = "" if self.max_length is not None else " (`max_length` cuts the texts)"
        return [f"Row {i} of privleak/{key}{hint}" for key, part in texts.items() for i in range(len(part))]

    def _min_k(self, model: Any, tokenizer: Any, texts: dict[str, list[Encoded]]) -> dict[str, Any]:
        """Return the Min-40 % score of every text, "forget" and "holdout": higher for what looks less familiar."""
        encoded = [row for part in texts.values() for row in part]
        found = score(
            model,
            encoded,
            pad_token_id=tokenizer.pad_token_id,
            batch_tokens=self.batch_tokens,
            compat=self.compat,
            label="MUSE: scoring texts",
        ).logprob
        scores = metrics.membership.mia_min_k(found, compat=True) if self.compat else metrics.membership.min_k(found)
        return {"forget": scores[: len(texts["forget"])], "holdout": scores[len(texts["forget"]) :]}

    def _privacy(
        self,
        model: Any,
        tokenizer: Any,
        texts: dict[str, list[Encoded]],
        rows: dict[str, list[Row]],
        reference: MuseReference | None,
    ) -> list[Record]:
        """Return the AUC of Min-40 % and, with the retrained model's, PrivLeak."""
        scores = self._min_k(model, tokenizer, texts)
        value = metrics.membership.auc(scores["forget"], scores["holdout"])
        n = sum(map(len, texts.values()))
        cut = sum(
            len(_ids(tokenizer, row["text"])) > len(encoded.input_ids)
            for key, part in texts.items()
            for row, encoded in zip(rows[f"privleak/{key}"], part, strict=True)
        )
        extra: dict[str, Any] = {
            "fingerprint": self._privacy_fingerprint(rows),
            "max_length": self.text_length,
            "cut": cut,
        }
        if cut:
            say([f"privleak: {cut} of {n} texts were cut to their first {self.text_length} tokens."])
        lists = {key: part.tolist() for key, part in scores.items()}
        between = metrics.samples.auc_interval(value, *(len(part) for part in lists.values()))
        records = [self._record("mia_min_k", value, n, scores=lists, interval=between, **extra)]
        if reference is None and not self.compat:
            say([how_to_make_a_reference(self._privacy_settings())])
            return records
        if reference is None:
            say(
                [
                    "privleak takes 0.5 for the retrained model's AUC, as OpenUnlearning does. "
                    + self._privacy_settings().remedy()
                ]
            )
        auc = None if reference is None else reference.auc
        leak, *ends = (metrics.membership.privleak(each, auc, compat=self.compat) for each in (value, *between))
        source = None if reference is None else reference.source
        extra |= {"auc": value, "reference": source, "reference_auc": auc, "interval": sorted(ends)}
        records.append(self._record("privleak", leak, n, **extra))
        return records

    # The retrained model's AUC

    def _privacy_fingerprint(self, rows: dict[str, list[Row]]) -> str:
        return _fingerprint(rows["privleak/forget"], rows["privleak/holdout"])

    def _privacy_settings(self) -> PrivacySettings:
        return PrivacySettings(
            self.corpus, self.data, self.mode, self.max_length, self.text_length, self.limit, self.seed
        )

    def _reference(self, rows: dict[str, list[Row]]) -> MuseReference | None:
        """Return the retrained model's AUC from a file or as published; None without one or for a model's folder."""
        if self.retain_records is None or "privleak" not in self.criteria or is_model(self.retain_records):
            return None
        return read_muse_reference(self.retain_records, self._privacy_settings(), self._privacy_fingerprint(rows))

    def _measured(self, rows: dict[str, list[Row]]) -> MuseReference:
        """Measure the AUC of the retrained model whose folder was given."""
        assert self.retain_records is not None
        model, tokenizer = self.alike(self.retain_records).load()
        texts = self._texts(tokenizer, rows)
        check_rows(model, [row for part in texts.values() for row in part], self._text_names(texts))
        scores = self._min_k(model, tokenizer, texts)
        return usable(
            MuseReference(self.retain_records, metrics.membership.auc(scores["forget"], scores["holdout"])), self.mode
        )
