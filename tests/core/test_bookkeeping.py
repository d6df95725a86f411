"""What outlives a forward pass can be changed after it, and holds no graph."""

import subprocess
import sys

import pytest
import torch

from jointkv.core.bookkeeping import bookkeeping


def test_tensors_made_in_inference_mode_can_be_changed_outside_and_hold_no_graph():
    @bookkeeping
    def make(weight):
        """Its name and text stay."""
        return weight * 2

    weight = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        made = make(weight)
    made += 1
    assert not made.is_inference() and not made.requires_grad
    assert make.__name__ == "make" and make.__doc__ == "Its name and text stay."


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_not_rounded_by_autocast(dtype):
    product = bookkeeping(torch.matmul)
    left, right = torch.randn(2, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.matmul(left, right).dtype == dtype
        assert product(left, right).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


def test_what_runs_without_a_model_imports_no_compiler():
    """It takes a second, and transformers alone needs it."""
    modules = ("core.table", "fusion.fuser", "fusion.resident", "theory.licence", "attention.paged", "cli.main")
    imports = ", ".join(f"jointkv.{name}" for name in modules)
    command = [sys.executable, "-c", f"import sys, {imports}; print('torch._dynamo' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"
