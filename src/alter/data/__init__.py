"""From rows to batches.

`sources` reads what a user names: `files`, `hub`, `tofu`. `rows` gives rows one form, `chat` and `encoding` make
token ids with labels of them, `batching` pads these. `domains` divides a forget set; `subjects` finds rows about a
person; `background` and `rewording` are text on which a router must not open, or must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.data import rewording as rewording
    from alter.data.background import apart_from as apart_from
    from alter.data.batching import Collator as Collator
    from alter.data.batching import LengthBatches as LengthBatches
    from alter.data.batching import batches_by_length as batches_by_length
    from alter.data.chat import TemplateArguments as TemplateArguments
    from alter.data.chat import end_of_turn as end_of_turn
    from alter.data.chat import ensure_pad_token as ensure_pad_token
    from alter.data.chat import set_template_arguments as set_template_arguments
    from alter.data.chat import share_template_arguments as share_template_arguments
    from alter.data.chat import with_template_arguments as with_template_arguments
    from alter.data.domains import have_labels as have_labels
    from alter.data.encoding import IGNORE as IGNORE
    from alter.data.encoding import Encoded as Encoded
    from alter.data.encoding import encode as encode
    from alter.data.encoding import encode_all as encode_all
    from alter.data.encoding import encode_prompt as encode_prompt
    from alter.data.encoding import own_answer as own_answer
    from alter.data.files import ENDINGS as ENDINGS
    from alter.data.files import TEXT_ENDINGS as TEXT_ENDINGS
    from alter.data.files import Row as Row
    from alter.data.files import read_file as read_file
    from alter.data.files import running_text as running_text
    from alter.data.hub import MUSE_HUB as MUSE_HUB
    from alter.data.hub import layout_rows as layout_rows
    from alter.data.hub import muse_rows as muse_rows
    from alter.data.rewording import FITTED as FITTED
    from alter.data.rewording import reworded as reworded
    from alter.data.rewording import telegram as telegram
    from alter.data.rows import Example as Example
    from alter.data.rows import check_overlap as check_overlap
    from alter.data.rows import data_hash as data_hash
    from alter.data.rows import examples as examples
    from alter.data.rows import load_examples as load_examples
    from alter.data.rows import row_hash as row_hash
    from alter.data.rows import row_key as row_key
    from alter.data.rows import said as said
    from alter.data.rows import turns_of as turns_of
    from alter.data.sources import GivenRows as GivenRows
    from alter.data.sources import check_unread as check_unread
    from alter.data.sources import for_others as for_others
    from alter.data.sources import from_anywhere as from_anywhere
    from alter.data.sources import local_parts as local_parts
    from alter.data.sources import named_rows as named_rows
    from alter.data.sources import read_rows as read_rows
    from alter.data.sources import settings_for_others as settings_for_others
    from alter.data.subjects import rows_about as rows_about
    from alter.data.tofu import TOFU_SPLITS as TOFU_SPLITS
    from alter.data.tofu import refusals as refusals
    from alter.data.tofu import tofu_authors as tofu_authors
    from alter.data.tofu import tofu_rows as tofu_rows

lazy(globals())
