"""From rows to batches: sources of rows, their common form, token ids with labels, sub-domains."""

from alter.data.examples import Example as Example
from alter.data.examples import check_overlap as check_overlap
from alter.data.examples import load_examples as load_examples
