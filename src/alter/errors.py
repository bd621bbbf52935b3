"""Public: what the library raises where a user can mend it.

`UserError` is a `ValueError` of one line that names the value, what was expected and the fix, with settings as `name` in backticks.
A `Finding` is one that says that all was done, and that what was measured or checked then speaks against it.
Everything else that is raised is a fault of the system (`OSError`) or of the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.core import Finding as Finding
    from alter.core import UserError as UserError

lazy(globals())
