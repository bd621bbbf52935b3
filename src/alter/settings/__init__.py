"""What every command's settings are made of, and how they are given.

`numbers` and `outputs` are types of fields; `recipes` and `flags` the two ways to give values, `validation` what refuses them, in
one line that names the setting, and `unknown` what refuses flags that a command does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.settings.flags import check_numbers as check_numbers
    from alter.settings.flags import flag_of as flag_of
    from alter.settings.flags import flags_of as flags_of
    from alter.settings.flags import given_once as given_once
    from alter.settings.flags import is_positional as is_positional
    from alter.settings.flags import list_flags as list_flags
    from alter.settings.flags import members_of as members_of
    from alter.settings.flags import split_recipe as split_recipe
    from alter.settings.flags import value_of as value_of
    from alter.settings.flags import with_defaults as with_defaults
    from alter.settings.flags import with_flags as with_flags
    from alter.settings.numbers import BatchSize as BatchSize
    from alter.settings.numbers import Count as Count
    from alter.settings.numbers import Passes as Passes
    from alter.settings.numbers import Rows as Rows
    from alter.settings.numbers import Seed as Seed
    from alter.settings.numbers import Steps as Steps
    from alter.settings.numbers import Temperature as Temperature
    from alter.settings.numbers import TemperatureOrZero as TemperatureOrZero
    from alter.settings.numbers import Tokens as Tokens
    from alter.settings.numbers import rounded as rounded
    from alter.settings.outputs import OutFile as OutFile
    from alter.settings.outputs import OutFolder as OutFolder
    from alter.settings.outputs import Written as Written
    from alter.settings.outputs import as_standard_output as as_standard_output
    from alter.settings.outputs import check_outputs as check_outputs
    from alter.settings.outputs import shown as shown
    from alter.settings.recipes import read_recipe as read_recipe
    from alter.settings.unknown import refuse_unknown as refuse_unknown
    from alter.settings.validation import in_words as in_words
    from alter.settings.validation import mistake as mistake
    from alter.settings.validation import nested as nested
    from alter.settings.validation import refusal as refusal
    from alter.settings.validation import validated as validated

lazy(globals())
