"""The host code has no finding of a sanitizer: see tests/sanitize/run.py."""

import pytest
from sanitize import run


@pytest.mark.parametrize("sanitizer", run.SANITIZERS)
def test_nothing_is_found(sanitizer, tmp_path):
    run.sanitize(tmp_path, sanitizer)
