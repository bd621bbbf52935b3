"""What every package shares, and what knows nothing of models, settings or files.

`errors` and `exports` are how packages refuse and how they export; `console` and `words` what is said and how text is split;
`processes`, `forked`, `streams`, `memory`, `heap` and `deferral` the process and those beside it; `arrays` the array type; `registration`
PEFT's door for outside methods; `caches` the names of transformers' caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core.exports import lazy as lazy

if TYPE_CHECKING:
    from alter.core import caches as caches
    from alter.core import console as console
    from alter.core import forked as forked
    from alter.core import memory as memory
    from alter.core import processes as processes
    from alter.core import words as words
    from alter.core.arrays import Array as Array
    from alter.core.caches import as_input as as_input
    from alter.core.caches import cache_given as cache_given
    from alter.core.caches import cache_of as cache_of
    from alter.core.caches import is_cache as is_cache
    from alter.core.console import LOG as LOG
    from alter.core.console import Beats as Beats
    from alter.core.console import cell as cell
    from alter.core.console import ignore_known_warnings as ignore_known_warnings
    from alter.core.console import is_silent as is_silent
    from alter.core.console import plain as plain
    from alter.core.console import progress as progress
    from alter.core.console import show as show
    from alter.core.console import silent as silent
    from alter.core.console import tell as tell
    from alter.core.console import warn as warn
    from alter.core.console import worded as worded
    from alter.core.console import wording as wording
    from alter.core.deferral import deferred as deferred
    from alter.core.errors import Finding as Finding
    from alter.core.errors import Unfinished as Unfinished
    from alter.core.errors import UserError as UserError
    from alter.core.errors import nearest as nearest
    from alter.core.errors import passing as passing
    from alter.core.exports import homes as homes
    from alter.core.heap import give_back as give_back
    from alter.core.memory import held as held
    from alter.core.registration import register as register
    from alter.core.streams import lasting as lasting
    from alter.core.words import MARKS as MARKS
    from alter.core.words import UNSPACED as UNSPACED
    from alter.core.words import bare as bare
    from alter.core.words import caseless as caseless
    from alter.core.words import edges as edges
    from alter.core.words import is_word as is_word
    from alter.core.words import pieces as pieces
    from alter.core.words import runs as runs
    from alter.core.words import spaced as spaced
    from alter.core.words import spans as spans
    from alter.core.words import titled as titled

lazy(globals())
