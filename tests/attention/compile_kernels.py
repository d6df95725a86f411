"""Compiles the Triton kernels, as they are called, for a GPU that need not be there. Run by test_triton_kernel.py: a
process that has Triton's interpreter has no compiler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from jointkv.attention import gpu, paged_triton
from jointkv.attention.paged import paged_attention
from jointkv.core.blocks import SUPPORTED_DTYPES, PagedKV
from jointkv.core.packed import PACKED_DTYPES, PackedPages
from jointkv.fusion.kernels import gpu as planning
from tests.attention.paged_cases import small_case, turn


class Compiled:
    """A kernel that is compiled where it would be started."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        def compile_only(*arguments: Any, **constants: Any) -> None:
            made = self.kernel.warmup(*arguments, grid=grid, **constants)
            print(
                self.kernel.__name__, constants, "bytes of shared memory:", made.metadata.shared, made.metadata.target
            )

        return compile_only


def no_gpu(capability: int) -> SimpleNamespace:
    """What Triton asks a driver before it compiles."""
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )


def compile_planning() -> None:
    """The kernels of fusion, for every type of elements."""
    for dtype in PACKED_DTYPES:
        place = torch.arange(64)
        pages = PackedPages([torch.zeros(2, 64).to(dtype)], place % 16, place >= 32)
        planning.Kernels().pair_sums(pages, torch.tensor([0]), torch.tensor([1]))
        planning.Kernels().signatures(pages, [torch.zeros(32, 64)] * 2)(pages, torch.tensor([0]))
    for dtype in SUPPORTED_DTYPES:
        kv = PagedKV(*([torch.zeros(2, 16, 1, 2).to(dtype)] for _ in range(2)))
        planning.Kernels().signatures(kv, [torch.zeros(32, 64)] * 2)(kv, torch.tensor([0]))


def main() -> None:
    planning.add_up, planning.project = Compiled(planning.add_up), Compiled(planning.project)
    kernels = {name: Compiled(getattr(paged_triton, name)) for name in ("attend", "merge")}
    gpu._kernels = lambda: SimpleNamespace(INTERPRETED=triton.language.constexpr(True), **kernels)
    triton.runtime.driver.set_active(no_gpu(90))
    batch, pages = small_case(dtype=torch.bfloat16)
    batch.query_lengths = torch.tensor([20, 20])
    work = batch.group(heads_per_kv_head=2, share=False)
    paged_attention(torch.zeros(40, 4, 16).bfloat16(), pages, work, kernel=gpu.attend)
    compile_planning()
    triton.runtime.driver.set_active(no_gpu(80))
    compile_planning()
    batch, pages = small_case(dtype=torch.float16)
    batch.shift = torch.tensor([[0, 3, 0], [0, 3, 0]])
    query, scales, work = torch.zeros(2, 4, 16).half(), torch.ones(2, 3), batch.group(heads_per_kv_head=2)
    paged_attention(query, pages, work, k_scale=scales, turn=turn, kernel=gpu.attend)


if __name__ == "__main__":
    main()
