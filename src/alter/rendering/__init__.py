"""Results made visible: what every command that shows results draws with.

`terminal` makes tables of records, `fitted` has them fit the terminal, `markup` HTML with charts in SVG, `figures` plots as files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.rendering import figures as figures
    from alter.rendering.figures import AFTER as AFTER
    from alter.rendering.figures import BEFORE as BEFORE
    from alter.rendering.figures import LINE as LINE
    from alter.rendering.figures import OTHER as OTHER
    from alter.rendering.figures import figure as figure
    from alter.rendering.figures import name_points as name_points
    from alter.rendering.fitted import FittedTable as FittedTable
    from alter.rendering.fitted import fitted_rows as fitted_rows
    from alter.rendering.markup import Html as Html
    from alter.rendering.markup import Point as Point
    from alter.rendering.markup import Style as Style
    from alter.rendering.markup import document as document
    from alter.rendering.markup import folded as folded
    from alter.rendering.markup import grid as grid
    from alter.rendering.markup import highlighted as highlighted
    from alter.rendering.markup import histogram as histogram
    from alter.rendering.markup import join as join
    from alter.rendering.markup import lines as lines
    from alter.rendering.markup import scatter as scatter
    from alter.rendering.markup import tag as tag
    from alter.rendering.terminal import ARROWS as ARROWS
    from alter.rendering.terminal import between as between
    from alter.rendering.terminal import drawn as drawn
    from alter.rendering.terminal import in_order as in_order
    from alter.rendering.terminal import number as number
    from alter.rendering.terminal import table as table
    from alter.rendering.values import called as called
    from alter.rendering.values import decimal as decimal
    from alter.rendering.values import duration as duration
    from alter.rendering.values import finite as finite
    from alter.rendering.values import percent as percent

lazy(globals())
