"""Every metric by name: which direction is good, and what it says in plain words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """The meaning of a metric's name.

    Attributes:
        higher_is_better: which direction is good; None: a target between, see `meaning`.
        meaning: in plain words.
        averages: the figure is the mean of its items, NaN left out, where a record has items. It is not for a truth ratio,
            whose items are the raw ratios, and for a perplexity, which is of all tokens at once.
    """

    higher_is_better: bool | None
    meaning: str
    averages: bool = True


CATALOGUE = {
    "forget_probability_reworded": Metric(False, "likelihood of the answers, asked in other words"),
    "forget_quality": Metric(True, "p-value of being like a model that never saw it"),
    "model_utility": Metric(True, "harmonic mean of the nine retain and world figures"),
    "forget_probability": Metric(False, "likelihood per token of the answers to forget"),
    "forget_rouge": Metric(False, "words of the answers to forget that it still says"),
    "forget_truth_ratio": Metric(True, "1: wrong answers are as likely as the right one", averages=False),
    "forget_exact_memorization": Metric(False, "next tokens of the answers predicted right"),
    "forget_extraction_strength": Metric(False, "part of an answer it completes by itself"),
    "forget_distinct_2": Metric(True, "different word pairs among all in its replies"),
    "forget_repetition": Metric(False, "four-word phrases repeated within a reply"),
    "retain_probability": Metric(True, "likelihood per token of the answers to keep"),
    "retain_rouge": Metric(True, "words of the answers to keep that it says"),
    "retain_truth_ratio": Metric(True, "1: only the right answer is likely", averages=False),
    "real_authors_probability": Metric(True, "the right answer's share among four"),
    "real_authors_rouge": Metric(True, "words of the right answers that it says"),
    "real_authors_truth_ratio": Metric(True, "1: only the right answer is likely", averages=False),
    "world_facts_probability": Metric(True, "the right answer's share among four"),
    "world_facts_rouge": Metric(True, "words of the right answers that it says"),
    "world_facts_truth_ratio": Metric(True, "1: only the right answer is likely", averages=False),
    "forget_said": Metric(False, "replies that still give the answer to forget"),
    "forget_unusable": Metric(False, "replies about it that are broken or empty"),
    "retain_exact_memorization": Metric(True, "next tokens of the answers to keep predicted right"),
    "retain_said": Metric(True, "replies that give the answer to keep"),
    "retain_unusable": Metric(False, "replies about it that are broken or empty"),
    "retain_repetition": Metric(False, "four-word phrases repeated within a reply"),
    "holdout_probability": Metric(None, "likelihood per token of answers never seen"),
    "holdout_exact_memorization": Metric(None, "next tokens of answers never seen predicted right"),
    "holdout_said": Metric(None, "replies that give an answer never seen"),
    "holdout_unusable": Metric(False, "replies about it that are broken or empty"),
    "holdout_repetition": Metric(False, "four-word phrases repeated within a reply"),
    "verbmem": Metric(False, "words of the true continuations that it says"),
    "knowmem_forget": Metric(False, "words of the forget set's answers that it says"),
    "knowmem_retain": Metric(True, "words of the retain set's answers that it says"),
    "book_bleu": Metric(False, "phrases of the true text that it goes on with, 0 to 100"),
    "book_corpus_bleu": Metric(False, "the same, of all passages as one text"),
    "book_rouge": Metric(False, "words of the true text that it goes on with"),
    "book_asg": Metric(False, "gap to the retrained model in BLEU and ROUGE, points"),
    "book_asg_signed": Metric(False, "the same, but gaps of opposite sign cancel"),
    "book_perplexity": Metric(None, "of the true text: right is what the retrained has", averages=False),
    "book_exact_memorization": Metric(False, "next tokens of the book predicted right"),
    "book_extraction_strength": Metric(False, "part of a passage it completes by itself"),
    "book_distinct_2": Metric(True, "different word pairs among all it says"),
    "book_repetition": Metric(False, "four-word phrases repeated within what it says"),
    "holdout_bleu": Metric(None, "the same of a text that it never read"),
    "holdout_rouge": Metric(None, "likewise"),
    "holdout_perplexity": Metric(None, "likewise: how unknown text looks to it", averages=False),
    "retain_perplexity": Metric(False, "of the texts to keep"),
    "retain_accuracy": Metric(True, "next tokens of the texts to keep predicted right"),
    "mia_loss": Metric(None, "attack by loss, AUC: 0.5 as if never seen, 1 known"),
    "mia_zlib": Metric(None, "attack by loss per compressed byte, likewise"),
    "mia_min_k": Metric(None, "attack by the least likely tokens, likewise"),
    "mia_min_k_plus_plus": Metric(None, "the same, normalised per position"),
    "mia_gradnorm": Metric(None, "attack by the size of the loss's gradient, likewise"),
    "mia_reference": Metric(None, "attack by loss against the retrained model, likewise"),
    "privleak": Metric(None, "min-k against the retrained model, %: 0 is right"),
    "kfr": Metric(True, "answers to forget of which a reply says little or contradicts them"),
    "krr": Metric(True, "answers to keep of which a reply says enough and contradicts nothing"),
    "sarr": Metric(False, "harmless questions about the topic that it refuses"),
    "iam": Metric(True, "1: answers as likely as to models that never saw them, 0: as before"),
    "rwku_forget": Metric(False, "words of the answers about the people that it says, mean of three"),
    "rwku_forget_fb": Metric(False, "the same, filling in blanks"),
    "rwku_forget_qa": Metric(False, "the same, answering questions"),
    "rwku_forget_aa": Metric(False, "the same, under adversarial questions"),
    "rwku_neighbor": Metric(True, "words of the answers about their neighbours that it says, mean of two"),
    "rwku_neighbor_fb": Metric(True, "the same, filling in blanks"),
    "rwku_neighbor_qa": Metric(True, "the same, answering questions"),
    "rwku_mia_forget": Metric(True, "loss per token of texts about the people: high is forgotten"),
    "rwku_mia_retain": Metric(False, "loss per token of texts about others"),
    "lume_forget_regurgitation": Metric(False, "words of the documents to forget that it goes on with"),
    "lume_forget_knowledge": Metric(False, "questions about them answered exactly"),
    "lume_retain_regurgitation": Metric(True, "words of the documents to keep that it goes on with"),
    "lume_retain_knowledge": Metric(True, "questions about them answered exactly"),
    "lume_task_aggregate": Metric(True, "harmonic mean over the tasks of all four"),
    "lume_mia": Metric(None, "attack by loss, AUC: 0.5 is right, 1 known"),
    "lume_score": Metric(True, "mean of the aggregate, membership and MMLU"),
    "knowundo_unlearn_success": Metric(True, "next tokens of the answers to unlearn predicted wrong"),
    "knowundo_retention_success": Metric(True, "next tokens of the answers to keep predicted right"),
    "knowundo_unlearn_perplexity": Metric(None, "of the answers to unlearn"),
    "knowundo_retention_perplexity": Metric(False, "of the answers to keep"),
    "knowundo_unlearn_rouge": Metric(False, "words of the answers to unlearn that it says"),
    "knowundo_retention_rouge": Metric(True, "words of the answers to keep that it says"),
    "fluency_perplexity": Metric(
        None, "replies read by the reference model: low is fluent, or repetitive", averages=False
    ),
    "fluency_perplexity_median": Metric(None, "the same of the middle reply", averages=False),
    "fluency_perplexity_alone": Metric(None, "the same, read without the prompt", averages=False),
    "fluency_distinct_1": Metric(True, "different words among all in its replies"),
    "fluency_distinct_2": Metric(True, "different word pairs among all in its replies"),
    "fluency_distinct_3": Metric(True, "different word triples among all in its replies"),
    "fluency_repetition": Metric(False, "four-word phrases repeated within a reply"),
    "fluency_length": Metric(None, "words in a reply"),
    "fluency_empty": Metric(False, "share of replies that say nothing"),
    "fluency_judge_mean": Metric(True, "judge's grade, 1 to 5 (Flu-mean)"),
    "fluency_judge_variance": Metric(False, "variance of the grades (Flu-var)"),
    "fluency_judge_unparsed": Metric(None, "share of verdicts that were no grade"),
    "entropy_mean": Metric(None, "nats for q = 1"),
    "entropy_high": Metric(None, "share of tokens above the threshold"),
    "entropy_bimodality": Metric(None, "Sarle's coefficient: a uniform has 0.556"),
    "entropy_two_normals": Metric(None, "gain in BIC per token of two normals over one"),
    "entropy_ashman": Metric(None, "distance of the two normals: above 2 apart"),
    "entropy_valley": Metric(None, "where the density between them is lowest; -: one mode"),
    "entropy_valley_depth": Metric(None, "how far it falls there: 0 one mode, 1 to nothing"),
    "entropy_high_stay": Metric(None, "share of high tokens that stay high"),
    "entropy_low_stay": Metric(None, "share of low tokens that stay low"),
    "entropy_agreement": Metric(None, "share of tokens that keep their side"),
    "entropy_kappa": Metric(None, "the same beyond chance: 0 chance, 1 all"),
    "entropy_correlation": Metric(None, "of the entropies before and after"),
    **{
        f"leak@{2**i}": Metric(False, f"chance that one of {2**i} sampled replies gives the answer") for i in range(11)
    },
    "disturbance": Metric(False, "nats a token by which it predicts ordinary text other than the original"),
    "leak": Metric(False, "chance that one of k sampled replies gives the answer"),
    "attacked_leak": Metric(False, "the same after an attacker has relearned other rows"),
    "attack_rouge": Metric(False, "words of the answers to forget that it says under an attack"),
    "attack_probability": Metric(False, "likelihood per token of the answers to forget, under an attack"),
    "attack_recovered_rouge": Metric(False, "share of the lost ROUGE-L recall that an attack brings back"),
    "attack_recovered_probability": Metric(False, "share of the lost probability that an attack brings back"),
    "attack_probe": Metric(False, "next tokens of the answers to forget that a linear probe reads in hidden states"),
    "attack_recovered_probe": Metric(False, "share of the probe's accuracy above the retrained model's that is left"),
    "attack_lens": Metric(False, "probability of the answers to forget that the model's own head reads at a block"),
    "attack_recovered_lens": Metric(False, "share of that probability above the retrained model's that is left"),
    "attack_uds": Metric(
        True, "unlearning depth score: how much less blocks know of the answers, 1: as the retrained"
    ),
    "attack_cka": Metric(None, "how alike two models' hidden states are, 1: equal up to rotation"),
    **{
        f"{task}_{name}": metric
        for task, better in (("mmlu", True), *((f"wmdp_{subject}", False) for subject in ("bio", "chem", "cyber")))
        for name, metric in {
            "acc": Metric(better, "questions answered right: 0.25 is chance"),
            "answer_entropy": Metric(None, "of the letters it answers: 1 evenly spread, 0 always one"),
            "top_answer": Metric(None, "share of the letter that it answers most"),
            "answer_ties": Metric(None, "questions whose likeliest letters tie"),
            "choice_mass": Metric(None, "probability of all letters together"),
        }.items()
    },
}
"""Every metric of the reports, in the order in which tables show it; of leak@k the usual k (see `metric_named`)."""


def metric_named(name: str) -> Metric:
    """Return the meaning of a metric's name, of leak@k for any k.

    Raises:
        KeyError: the catalogue has no such name.
    """
    number = name.removeprefix("leak@")
    if number != name and number.isdecimal():
        return Metric(False, f"chance that one of {number} sampled replies gives the answer")
    return CATALOGUE[name]


def meaning_of(name: str) -> str:
    """Return what a metric says, in plain words; an empty text for one that others have added."""
    try:
        return metric_named(name).meaning
    except KeyError:
        return ""
