"""Physical pages of keys and values: allocated, shared by counting, given back.

A page holds `page` neighbouring positions of one plane, for every layer of its kind. A *slot* is one position of one
page; slot = page * page_size + offset. Axes: S slots, G key-value heads, K head width.
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.errors import ConfigError


class PagePool:
    """All pages of one kind (the core's, or those of prelude and coda).

    Tensors are reserved at once; the system backs them with memory only as pages are first written.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        pages: int,
        page: int,
        kv_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page = page
        self.pages = pages
        self.nowhere = pages * page
        """A slot behind all pages that no table points at: rows that only pad a launch write there."""
        shape = (self.nowhere + 1, kv_heads, head_width)
        self.keys: dict[int, Float[Tensor, "slots kv_heads head_width"]] = {
            layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers
        }
        self.values: dict[int, Float[Tensor, "slots kv_heads head_width"]] = {
            layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers
        }
        # The page that was freed last is taken first: its memory is there already and likely in a cache.
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self.page_bytes = page_bytes(len(layers), page, kv_heads, head_width, dtype)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A page that nobody holds; the caller has seen that there is one."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One holder more."""
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder fewer; without any the page is free."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)
        elif self._holders[page] < 0:
            raise RuntimeError(f"page {page} was given back more often than it was taken")

    def holders(self, page: int) -> int:
        """How many hold this page."""
        return self._holders[page]

    def read(self, pages: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """A copy of some pages, layer by layer, in host memory."""
        index = torch.tensor(list(pages), dtype=torch.long)
        return [
            (self._paged(self.keys[layer])[index.to(self.keys[layer].device)].cpu(),
             self._paged(self.values[layer])[index.to(self.values[layer].device)].cpu())
            for layer in self.keys
        ]  # fmt: skip

    def write(self, pages: Sequence[int], content: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put back what `read` copied, into other pages."""
        for layer, (keys, values) in zip(self.keys, content, strict=True):
            index = torch.tensor(list(pages), dtype=torch.long, device=self.keys[layer].device)
            self._paged(self.keys[layer])[index] = keys.to(self.keys[layer].device)
            self._paged(self.values[layer])[index] = values.to(self.values[layer].device)

    def _paged(self, table: Tensor) -> Tensor:
        return table[: self.nowhere].view(self.pages, self.page, *table.shape[1:])


def page_bytes(layers: int, page: int, kv_heads: int, head_width: int, dtype: torch.dtype) -> int:
    """Bytes of one page's keys and values."""
    return 2 * layers * page * kv_heads * head_width * dtype.itemsize


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: int | str) -> int:
    """A number of bytes, from a number or a text such as "4GiB", "512MiB" or "1.5GB".

    Raises:
        ConfigError: anything else, or less than one byte.
    """
    if isinstance(text, int):
        count = text
    else:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text.strip())
        unit = None if found is None else _UNITS.get(found[2].upper())
        count = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if count < 1:
        raise ConfigError(f'memory={text!r}: allowed is a number of bytes, or a text such as "4GiB" or "512MiB"')
    return count
