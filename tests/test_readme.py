"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    namespace: dict = {}
    # The ops' examples share one import; every other line stands alone.
    exec(compile("import torch, esokern\n" + EXAMPLES[number], f"README example {number + 1}", "exec"), namespace)
