"""Sub-domains of a forget set: named ones, or clusters of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alter.core import UserError, words
from alter.data.rows import Example

if TYPE_CHECKING:
    import numpy.typing as npt

DIMENSIONS = 50
"""Most dimensions that the rows are grouped in."""
DOMAIN_RANGE = (2, 20)
"""Numbers of sub-domains that `domains` tries by default when it chooses the number itself."""


def domains(
    examples: Sequence[Example],
    *,
    n: int | None = None,
    seed: int = 0,
    max_domains: int = DOMAIN_RANGE[1],
    states: npt.NDArray[Any] | None = None,
) -> tuple[list[int], list[str]]:
    """Divide examples into sub-domains, one adapter expert each (Chen et al. 2026, section on asymmetric LoRA).

    If every example has a label, the labels are the sub-domains, in order of first appearance. Otherwise prompt and
    answer become TF-IDF vectors (English stop words left out), reduced to at most 50 dimensions by a truncated SVD and
    scaled to length 1, and k-means groups them. Without `n` the number is the one of best mean silhouette among
    2 ... min(max_domains, rows - 1), the smaller on a tie. The same seed gives the same result.

    Words part rows about persons, whose names they hold; subjects that share no words are parted by meaning. So with `states`
    these are grouped too (each dimension standardised, then at most 50 principal components, scaled to length 1), and
    the groups of the better silhouette are taken, those by words on a tie.

    Args:
        examples: what to divide.
        n: number of sub-domains; None chooses it.
        seed: of the reductions and of k-means.
        max_domains: largest number tried when `n` is None.
        states: [rows, width], what a model makes of each row: the mean of its tokens' last hidden states.

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
    if have_labels(examples):
        return _by_label(examples, n)
    if n == 1 or rows == 1:
        return [0] * rows, ["all"]
    return _clustered(examples, n, seed, max_domains, states)


def have_labels(examples: Sequence[Example]) -> bool:
    """Tell whether every example names its sub-domain."""
    return all(example.domain is not None for example in examples)


def _by_label(examples: Sequence[Example], n: int | None) -> tuple[list[int], list[str]]:
    """Take the labels as the sub-domains, in order of first appearance."""
    labels = [example.domain for example in examples]
    names = [str(label) for label in dict.fromkeys(labels)]
    if n is not None and n != len(names):
        raise UserError(f"The rows carry {len(names)} sub-domain labels but {n} were asked for; leave one out.")
    return [names.index(str(label)) for label in labels], names


def _clustered(
    examples: Sequence[Example], n: int | None, seed: int, max_domains: int, states: npt.NDArray[Any] | None
) -> tuple[list[int], list[str]]:
    """Cluster two or more examples by their words, and by `states` if those separate better; arguments as in `domains`."""
    rows, vectors = len(examples), _tfidf(examples)
    if n is not None and n > vectors.distinct:
        raise UserError(
            f"{n} sub-domains are not possible: only {vectors.distinct} of the {rows} rows differ in their words."
        )
    most = n if n is not None else min(max_domains, rows - 1, vectors.distinct)
    if vectors.distinct == 1 or most < 2:
        return [0] * rows, ["all"]
    counts = [n] if n is not None else range(2, most + 1)
    found = [_groups(_by_words(vectors.weights, seed), counts, seed)]
    if states is not None:
        found.append(_groups(_by_meaning(states), counts, seed))
    best = max(found, key=lambda one: one.silhouette).groups
    # number the groups by their first row: k-means' own order means nothing
    order = list(dict.fromkeys(best))
    indices = [order.index(label) for label in best]
    return indices, [f"{number}: {', '.join(vectors.telling(indices, number))}" for number in range(len(order))]


@dataclass(frozen=True)
class _Vectors:
    """TF-IDF vectors of some rows.

    Attributes:
        weights: sparse [rows, terms].
        terms: as they are counted.
        spelt: how each term is written, by case-folded word.
        distinct: how many rows differ.
    """

    weights: Any
    terms: Sequence[str]
    spelt: Mapping[str, Counter[str]]
    distinct: int

    def telling(self, indices: Sequence[int], group: int) -> list[str]:
        """Return the three terms that best separate a group's rows from the others, in their usual spelling."""
        import numpy as np

        inside = np.array(indices) == group
        own, others = (self.weights[np.flatnonzero(part)] for part in (inside, ~inside))
        mean, share, elsewhere = (
            np.asarray(part.mean(axis=0)).ravel() for part in (own, own.astype(bool), others.astype(bool))
        )
        # what all sub-domains speak of names none of them
        heaviest = [str(self.terms[column]) for column in np.argsort(mean * (elsewhere - share), kind="stable")[:3]]
        return [self.spelt[term].most_common(1)[0][0] if term in self.spelt else term for term in heaviest]


def _tfidf(examples: Sequence[Example]) -> _Vectors:
    """Compute TF-IDF vectors of prompt and answer together, without English stop words.

    Raises:
        UserError: there are no words.
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

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
    spelt: dict[str, Counter[str]] = {}
    for text in texts:
        for word in words.runs(text):
            spelt.setdefault(word.casefold(), Counter())[word] += 1
    return _Vectors(weights, vectorizer.get_feature_names_out(), spelt, distinct)


def _by_words(weights: Any, seed: int) -> npt.NDArray[Any]:
    """Reduce and scale sparse vectors [rows, terms]."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    size = min(DIMENSIONS, weights.shape[0] - 1, weights.shape[1] - 1)
    dense = TruncatedSVD(size, random_state=seed).fit_transform(weights) if size >= 2 else weights.toarray()
    points: npt.NDArray[Any] = normalize(dense)
    return points


def _by_meaning(states: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Standardise, reduce and scale states [rows, width]: a few dimensions of a model's states dwarf all others."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler, normalize

    standard = StandardScaler().fit_transform(states)
    reduced = PCA(min(DIMENSIONS, *standard.shape), svd_solver="full").fit_transform(standard)
    points: npt.NDArray[Any] = normalize(reduced)
    return points


@dataclass(frozen=True)
class _Groups:
    """The group of each row, and how well the groups separate: the mean silhouette, -1 to 1."""

    groups: list[int]
    silhouette: float


def _groups(points: npt.NDArray[Any], counts: Sequence[int], seed: int) -> _Groups:
    """Cluster [rows, dimensions] by k-means; of several counts take the one of best silhouette, the fewer on a tie."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    best: _Groups | None = None
    for count in counts:
        found = KMeans(count, n_init=10, random_state=seed).fit_predict(points)
        # as many groups as rows, or points that are all the same, have no silhouette
        apart = float(silhouette_score(points, found)) if 1 < len(set(found)) < len(points) else -1.0
        if best is None or apart > best.silhouette:
            best = _Groups([int(label) for label in found], apart)
    assert best is not None
    return best
