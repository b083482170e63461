"""Buffers that stay in fp32 when a module is cast to half precision.

DeepSpeed and `module.to(torch.bfloat16)` cast floating buffers as well as parameters. A codebook must not be cast: its
small moving-average steps vanish in bf16, and every patch ends at one code (ESPnet PR 6437).
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose floating buffers move between devices with their exact fp32 values, whatever the cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact: dict[str, Any] = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.dtype == torch.float32 and not buffer.is_meta
        }
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self
