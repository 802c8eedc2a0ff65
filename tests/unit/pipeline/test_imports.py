"""What a producer may import without torch on its machine."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["", ".request", ".errors", ".planner", ".image_file", ".checkpoint"])
def test_this_module_imports_no_torch(module: str) -> None:
    code = (
        f"import sys, pipeline{module}; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
