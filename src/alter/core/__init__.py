"""What every package shares, and what knows nothing of models: a shelf of small modules, each for itself.

Errors and settings: `errors`, `validation`, `numbers`, `recipes`, `flags`, `plugins`, `registration`. Files and
results: `files`, `outputs`, `records`, `provenance`, `cache`, `tensors`, `signing`. The process: `console`, `streams`,
`processes`, `running`, `heap`, `memory`, `deferral`, `exports`. `arrays` and `words` are the array type and the splitting
of text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core.exports import lazy as lazy

if TYPE_CHECKING:
    from alter.core import console as console
    from alter.core import files as files
    from alter.core import memory as memory
    from alter.core import processes as processes
    from alter.core import records as records
    from alter.core import words as words
    from alter.core.arrays import Array as Array
    from alter.core.cache import Cached as Cached
    from alter.core.cache import cache_folder as cache_folder
    from alter.core.cache import recall as recall
    from alter.core.cache import remember as remember
    from alter.core.console import LOG as LOG
    from alter.core.console import cell as cell
    from alter.core.console import ignore_known_warnings as ignore_known_warnings
    from alter.core.console import is_silent as is_silent
    from alter.core.console import plain as plain
    from alter.core.console import progress as progress
    from alter.core.console import show as show
    from alter.core.console import silent as silent
    from alter.core.console import warn as warn
    from alter.core.console import worded as worded
    from alter.core.console import wording as wording
    from alter.core.deferral import deferred as deferred
    from alter.core.errors import UserError as UserError
    from alter.core.errors import nearest as nearest
    from alter.core.exports import homes as homes
    from alter.core.files import CONTENT as CONTENT
    from alter.core.files import check_disk as check_disk
    from alter.core.files import digest as digest
    from alter.core.files import file_digest as file_digest
    from alter.core.files import folder_digest as folder_digest
    from alter.core.files import from_json as from_json
    from alter.core.files import read_object as read_object
    from alter.core.files import read_text as read_text
    from alter.core.files import replacing as replacing
    from alter.core.files import to_csv as to_csv
    from alter.core.files import to_json as to_json
    from alter.core.files import write_atomic as write_atomic
    from alter.core.flags import check_numbers as check_numbers
    from alter.core.flags import flag_of as flag_of
    from alter.core.flags import given_once as given_once
    from alter.core.flags import is_positional as is_positional
    from alter.core.flags import list_flags as list_flags
    from alter.core.flags import members_of as members_of
    from alter.core.flags import split_recipe as split_recipe
    from alter.core.flags import value_of as value_of
    from alter.core.flags import with_defaults as with_defaults
    from alter.core.flags import with_flags as with_flags
    from alter.core.heap import give_back as give_back
    from alter.core.memory import held as held
    from alter.core.numbers import BatchSize as BatchSize
    from alter.core.numbers import Count as Count
    from alter.core.numbers import Passes as Passes
    from alter.core.numbers import Rows as Rows
    from alter.core.numbers import Seed as Seed
    from alter.core.numbers import Steps as Steps
    from alter.core.numbers import Temperature as Temperature
    from alter.core.numbers import TemperatureOrZero as TemperatureOrZero
    from alter.core.numbers import Tokens as Tokens
    from alter.core.numbers import rounded as rounded
    from alter.core.outputs import OutFile as OutFile
    from alter.core.outputs import OutFolder as OutFolder
    from alter.core.outputs import Written as Written
    from alter.core.outputs import as_standard_output as as_standard_output
    from alter.core.outputs import check_outputs as check_outputs
    from alter.core.outputs import shown as shown
    from alter.core.plugins import BENCHMARKS as BENCHMARKS
    from alter.core.plugins import OneOf as OneOf
    from alter.core.plugins import Registry as Registry
    from alter.core.plugins import add_files as add_files
    from alter.core.plugins import kinds as kinds
    from alter.core.plugins import plugins_digest as plugins_digest
    from alter.core.provenance import code_digest as code_digest
    from alter.core.provenance import commit as commit
    from alter.core.provenance import stamped as stamped
    from alter.core.provenance import versions as versions
    from alter.core.recipes import read_recipe as read_recipe
    from alter.core.records import VERSION as VERSION
    from alter.core.records import Record as Record
    from alter.core.records import read_records as read_records
    from alter.core.records import read_run as read_run
    from alter.core.records import write_records as write_records
    from alter.core.registration import register as register
    from alter.core.running import CLAIM_FILE as CLAIM_FILE
    from alter.core.running import check_deletable as check_deletable
    from alter.core.running import check_free as check_free
    from alter.core.running import claim as claim
    from alter.core.running import release as release
    from alter.core.running import undone_if_refused as undone_if_refused
    from alter.core.signing import Forged as Forged
    from alter.core.signing import Key as Key
    from alter.core.signing import canonical as canonical
    from alter.core.signing import check as check
    from alter.core.signing import fingerprint as fingerprint
    from alter.core.signing import new_key as new_key
    from alter.core.signing import read_exact as read_exact
    from alter.core.signing import read_key as read_key
    from alter.core.signing import read_public as read_public
    from alter.core.signing import read_signed as read_signed
    from alter.core.signing import signed_text as signed_text
    from alter.core.streams import lasting as lasting
    from alter.core.tensors import keep as keep
    from alter.core.tensors import kept as kept
    from alter.core.validation import mistake as mistake
    from alter.core.validation import refusal as refusal
    from alter.core.validation import validated as validated
    from alter.core.words import UNSPACED as UNSPACED
    from alter.core.words import bare as bare
    from alter.core.words import edges as edges
    from alter.core.words import is_word as is_word
    from alter.core.words import pieces as pieces
    from alter.core.words import runs as runs
    from alter.core.words import spaced as spaced
    from alter.core.words import spans as spans

lazy(globals())
