"""A copy of the training state on the device, which a thread then fetches while training continues."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_ALIGNMENT = 16  # elements; CUDA's kernels copy 16 bytes at a time


class Snapshot:
    """Copies tensors into buffers that are allocated once: on the device, and in pinned memory on the host.

    A copy of a state's thousands of tensors one by one to pageable memory would wait for the device each time. The
    buffers take as much memory as the tensors, on both sides.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[str, torch.Size, tuple[int, ...], torch.dtype]] = []
        self._flat: dict[torch.dtype, Tensor] = {}
        self._host: dict[torch.dtype, Tensor] = {}
        self._offsets: dict[str, int] = {}
        self._views: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Copies the tensors on their device, without waiting for it.

        Args:
            tensors: by name, all on one device; the same names and shapes reuse the buffers.

        Returns:
            A function for another thread that returns them on the CPU. They are valid until the next `take`, which
            must not be called before that function has returned.
        """
        self._allocate(tensors)
        groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, value in tensors.items():
            copies, values = groups[value.dtype]
            copies.append(self._views[name])
            values.append(value.detach())
        for copies, values in groups.values():
            torch._foreach_copy_(copies, values)
        device = next(iter(self._flat.values())).device
        if device.type != "cuda":
            return lambda: dict(self._views)
        copied = torch.cuda.Event()
        copied.record()
        return lambda: self._fetch(device, copied)

    def _fetch(self, device: torch.device, copied: torch.cuda.Event) -> dict[str, Tensor]:
        torch.cuda.set_device(device)  # of this thread; a new one uses the first GPU
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(copied)
            for dtype, flat in self._flat.items():
                if dtype not in self._host:
                    self._host[dtype] = torch.empty_like(flat, device="cpu", pin_memory=True)
                self._host[dtype].copy_(flat, non_blocking=True)
            self._stream.synchronize()
        return {name: self._view(self._host, name, view) for name, view in self._views.items()}

    def _allocate(self, tensors: Mapping[str, Tensor]) -> None:
        # empty_like's strides are dense, and equal to the tensor's if that is dense, which the fast copy needs.
        like = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
        layout = [(name, each.shape, each.stride(), each.dtype) for name, each in like.items()]
        if layout == self._layout:
            return
        self._flat, self._host, self._views, self._offsets = {}, {}, {}, {}
        sizes: dict[torch.dtype, int] = defaultdict(int)
        for name, each in like.items():
            self._offsets[name] = sizes[each.dtype]
            sizes[each.dtype] += each.numel() + -each.numel() % _ALIGNMENT
        device = next(iter(tensors.values())).device
        self._flat = {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        self._views = {name: self._view(self._flat, name, each) for name, each in like.items()}
        self._layout = layout

    def _view(self, flat: Mapping[torch.dtype, Tensor], name: str, like: Tensor) -> Tensor:
        return flat[like.dtype].as_strided(like.shape, like.stride(), self._offsets[name])
