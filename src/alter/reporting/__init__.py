"""`alter report`: one HTML page about runs, their attacks and requests, to hand over.

`runs` reads what the page is about, `page` puts it together; a module for each section: `summary`, `verdict`,
`tables`, `samples`, `tokens`, `training`, `attacks`, `requests`, `origin`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.reporting.page import report as report
    from alter.reporting.settings import Report as Report

lazy(globals())
