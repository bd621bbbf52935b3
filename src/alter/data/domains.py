"""Sub-domains of a forget set: the named ones, or clusters of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from alter.core import words
from alter.core.errors import UserError
from alter.data.examples import Example

DOMAIN_RANGE = (2, 20)
"""Numbers of sub-domains that `domains` tries by default when it chooses the number itself."""


# ---------------------------------------------------------------------------------------------------------------------
# Sub-domains


def domains(
    examples: Sequence[Example], *, n: int | None = None, seed: int = 0, max_domains: int = DOMAIN_RANGE[1]
) -> tuple[list[int], list[str]]:
    """Divide examples into sub-domains, one adapter expert each (Chen et al. 2026, section on asymmetric LoRA).

    If every example has a label, the labels are the sub-domains, in order of first appearance. Otherwise prompt and
    answer become TF-IDF vectors (English stop words left out), reduced to at most 50 dimensions by a truncated SVD and
    scaled to length 1, and k-means groups them. Without `n` the number is the one of best mean silhouette among
    2 ... min(max_domains, rows - 1), the smaller on a tie. The same seed gives the same result.

    Args:
        examples: what to divide.
        n: number of sub-domains; None chooses it.
        seed: of the SVD and of k-means.
        max_domains: largest number tried when `n` is None.

    Returns:
        The sub-domain's index for each example, and a name for each sub-domain: its label, or its number and the three
        terms whose mean weight, times how much more of its rows than of the others hold them, is largest, as they are mostly
        written.

    Raises:
        UserError: `n` is below 1, above the number of rows, or differs from the number of labels.
    """
    rows = len(examples)
    if rows == 0:
        raise UserError("There are no examples to divide into sub-domains.")
    if n is not None and not 1 <= n <= rows:
        raise UserError(f"{n} sub-domains are not possible with {rows} rows; expected 1 to {rows}.")
    labels = [example.domain for example in examples]
    if all(label is not None for label in labels):
        names = [str(label) for label in dict.fromkeys(labels)]
        if n is not None and n != len(names):
            raise UserError(f"The rows carry {len(names)} sub-domain labels but {n} were asked for; leave one out.")
        return [names.index(str(label)) for label in labels], names
    if n == 1 or rows == 1:
        return [0] * rows, ["all"]

    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import silhouette_score
    from sklearn.preprocessing import normalize

    texts = [" ".join(filter(None, (example.prompt, example.answer))) for example in examples]
    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english", tokenizer=words.terms, token_pattern=None)
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise UserError(
            f"The rows hold no words to divide them by ({error}); label them with a domain column."
        ) from None
    # row by row: a dense copy of thousands of long rows would not fit into memory
    weights.sort_indices()
    spans = [slice(*ends) for ends in zip(weights.indptr, weights.indptr[1:], strict=False)]
    distinct = len({(weights.indices[span].tobytes(), np.round(weights.data[span], 9).tobytes()) for span in spans})
    if n is not None and n > distinct:
        raise UserError(f"{n} sub-domains are not possible: only {distinct} of the {rows} rows differ in their words.")

    if distinct == 1:
        return [0] * rows, ["all"]
    size = min(50, rows - 1, weights.shape[1] - 1)
    dense = TruncatedSVD(size, random_state=seed).fit_transform(weights) if size >= 2 else weights.toarray()
    points = normalize(dense)

    def cluster(count: int) -> np.ndarray:
        return KMeans(count, n_init=10, random_state=seed).fit_predict(points)

    if n is not None:
        best = cluster(n)
    else:
        candidates = range(2, min(max_domains, rows - 1, distinct) + 1)
        if not candidates:
            return [0] * rows, ["all"]
        found = {count: cluster(count) for count in candidates}
        score = {count: silhouette_score(points, found[count]) for count in candidates}
        best = found[max(candidates, key=lambda count: (score[count], -count))]
    # number the groups by their first row: k-means' own order means nothing
    order = list(dict.fromkeys(int(label) for label in best))
    indices = [order.index(int(label)) for label in best]
    terms = vectorizer.get_feature_names_out()
    spelt: dict[str, Counter[str]] = {}
    for text in texts:
        for word in words.runs(text):
            spelt.setdefault(word.casefold(), Counter())[word] += 1
    names = []
    for number in range(len(order)):
        inside = np.array(indices) == number
        own, others = (weights[np.flatnonzero(part)] for part in (inside, ~inside))
        mean, share, elsewhere = (
            np.asarray(part.mean(axis=0)).ravel() for part in (own, own.astype(bool), others.astype(bool))
        )
        # what all sub-domains speak of names none of them
        heaviest = [str(terms[column]) for column in np.argsort(mean * (elsewhere - share), kind="stable")[:3]]
        told = [spelt[term].most_common(1)[0][0] if term in spelt else term for term in heaviest]
        names.append(f"{number}: {', '.join(told)}")
    return indices, names
