"""Faults of the pages that were found in a browser and on paper: each test failed before its fault was mended."""

import json

import pytest

from alter.core.errors import UserError
from alter.report.runs import read_reported


def test_a_distilled_model_is_not_called_broken(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"student": "m"}}))
    with pytest.raises(UserError) as refused:
        read_reported(str(tmp_path))
    assert str(refused.value) == (
        f"{tmp_path} was made by `alter distill`, of which a page shows the figures: give `records` {tmp_path}/records.json."
    )
