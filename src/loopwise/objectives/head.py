"""Cross-entropy through the output head in chunks of tokens: the logits of all loops never exist at once.

The weight of every token's loss is known before the head runs (objectives split sum p CE into
sum p.detach() CE + sum p CE.detach()), so the forward pass computes a chunk's logits, its losses and at once
its gradients, and throws the logits away. Each chunk costs three matrix products and two passes over its logits.

Axes: R loops, B batch, T tokens, D width, V vocabulary, N = B T rows of one loop, M rows whose loss counts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.errors import InputError

CPU_CHUNK_ROWS = 512
"""More rows make the matrix products no faster and the logits leave the cache."""
CPU_CHUNK_BYTES = 64 * 2**20
ACCELERATOR_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """What `token_losses` returns."""

    weighted: Float[Tensor, ""]
    """The weighted sum of the losses, in nats; differentiable in the hidden states and the head."""
    losses: Float[Tensor, "loops batch tokens"]
    """Cross-entropy of every token at every loop in nats, detached, float32 or wider; 0 where the mask is False."""


def token_losses(
    hidden: Float[Tensor, "loops batch tokens width"] | Sequence[Float[Tensor, "batch tokens width"]],
    head_weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "batch tokens"],
    *,
    weights: Float[Tensor, "loops batch tokens"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    chunk_bytes: int | None = None,
) -> TokenLosses:
    """Next-token losses of every loop, and their weighted sum with its gradients.

    Args:
        hidden: what the head multiplies, one entry per loop. A sequence of tensors saves a copy of them all.
        head_weight: the head's matrix; for a tied head the embedding itself.
        targets: the wanted token ids. Where `mask` is False they are not looked at.
        weights: factor of each loss in the sum, detached. None: losses alone, no gradients, `weighted` is 0.
        mask: the positions whose loss is computed; None: all. Give it on the CPU to spare an accelerator a wait.
        chunk_bytes: bytes that one chunk's logits may take (one row at least). None: 512 rows and at most 64 MiB on a
            CPU, 256 MiB elsewhere.

    Raises:
        InputError: shapes that do not fit, weights that require gradients, float16, a target out of range.
    """
    hiddens = list(hidden.unbind(0) if isinstance(hidden, Tensor) else hidden)
    _check(hiddens, head_weight, targets, weights, mask)
    index = None
    if mask is not None:
        index = mask.flatten().nonzero().squeeze(1).to(hiddens[0].device)
        if index.numel() == mask.numel():
            index = None
    wanted = targets.flatten() if index is None else targets.flatten()[index.to(targets.device)]
    wanted = wanted.to(hiddens[0].device).long()
    # On an accelerator the look-up itself fails; asking here would make the host wait.
    if wanted.device.type == "cpu" and wanted.numel():
        low, high = (int(bound) for bound in torch.aminmax(wanted))
        if low < 0 or high >= head_weight.shape[0]:
            raise InputError(
                f"targets run from {low} to {high}, the head has {head_weight.shape[0]} tokens; "
                "mark positions without a target by mask=False"
            )
    apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedHead.apply
    weighted, losses = apply(chunk_bytes, wanted, index, weights, head_weight, *hiddens)
    return TokenLosses(weighted=weighted, losses=losses)


def _check(
    hiddens: list[Tensor], head_weight: Tensor, targets: Tensor, weights: Tensor | None, mask: Tensor | None
) -> None:
    if not hiddens:
        raise InputError("hidden has no loops; give one (B, T, D) tensor per loop that is read")
    shape = tuple(hiddens[0].shape)
    if len(shape) != 3 or any(tuple(state.shape) != shape for state in hiddens):
        raise InputError(f"hidden states of shapes {[tuple(state.shape) for state in hiddens]}; all must be (B, T, D)")
    if head_weight.ndim != 2 or head_weight.shape[1] != shape[2]:
        raise InputError(f"a head of shape {tuple(head_weight.shape)} for hidden width {shape[2]}; give (V, D)")
    for name, tensor, expected in (
        ("targets", targets, shape[:2]),
        ("mask", mask, shape[:2]),
        ("weights", weights, (len(hiddens), *shape[:2])),
    ):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise InputError(f"{name} of shape {tuple(tensor.shape)}; these hidden states need {expected}")
    if weights is not None and weights.requires_grad:
        raise InputError("weights carry gradients, which would be lost here; detach them and add a gate loss")
    dtype = _working_dtype(hiddens[0])
    if dtype == torch.float16:
        raise InputError("float16 underflows in the head's gradient; use bfloat16 or float32")
    if head_weight.dtype != hiddens[0].dtype and not torch.is_autocast_enabled(hiddens[0].device.type):
        raise InputError(f"head in {head_weight.dtype}, hidden states in {hiddens[0].dtype}; cast one to the other")


def _working_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: that of the states, or autocast's, which never narrows float64."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class _ChunkedHead(torch.autograd.Function):
    """weighted, losses from chunk_bytes, targets (M,), rows (M,) or None, weights (R, B, T) or None, head, *hidden."""

    @staticmethod
    def forward(
        ctx: Any,
        chunk_bytes: int | None,
        targets: Tensor,
        rows: Tensor | None,
        weights: Tensor | None,
        head: Tensor,
        *hiddens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs_head, *needs_hidden = (weights is not None and needed for needed in ctx.needs_input_grad[4:])
        dtype = _working_dtype(hiddens[0])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        matrix = head.to(dtype)
        batch, tokens, width = hiddens[0].shape
        losses = matrix.new_zeros((len(hiddens), batch * tokens), dtype=wide)
        factors = None if weights is None else weights.to(losses).view_as(losses)
        count = targets.numel()
        grad_head = None
        if needs_head:
            grad_head = torch.empty_like(head, dtype=wide) if count else torch.zeros_like(head, dtype=wide)
        grad_hiddens: list[Tensor | None] = []
        with torch.autocast(head.device.type, enabled=False):
            scratch = _Scratch.allocate(matrix, count, chunk_bytes, wide)
            first = True
            for loop, hidden in enumerate(hiddens):
                states = hidden.reshape(-1, width)
                grad = torch.zeros_like(states) if needs_hidden[loop] else None
                for start in range(0, count, scratch.rows):
                    here = slice(start, start + scratch.rows)
                    at = here if rows is None else rows[here]
                    state = states[at].to(dtype)
                    chunk_losses, difference = scratch.fill(state, matrix, targets[here])
                    losses[loop, at] = chunk_losses
                    if factors is None or (grad is None and grad_head is None):
                        continue
                    factor = factors[loop, at].unsqueeze(1)
                    error = scratch.narrow(difference)
                    if grad is not None:
                        grad[at] = (error @ matrix).mul_(factor).to(grad.dtype)
                    if grad_head is not None:
                        _add_product(grad_head, error.t(), (state * factor).to(dtype), overwrite=first)
                        first = False
                grad_hiddens.append(None if grad is None else grad.view_as(hidden))
        weighted = losses.new_zeros(()) if factors is None else (losses * factors).sum()
        losses = losses.view(len(hiddens), batch, tokens)
        ctx.head_dtype = head.dtype
        ctx.save_for_backward(grad_head, *grad_hiddens)
        ctx.mark_non_differentiable(losses)
        return weighted, losses

    @staticmethod
    def backward(ctx: Any, grad_weighted: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InputError("the chunked head has no second derivatives; leave out create_graph=True")
        grads = ctx.saved_tensors
        # Asking costs nothing on a CPU; on an accelerator it would make the host wait.
        if grad_weighted.device.type != "cpu" or float(grad_weighted) != 1.0:
            grads = [None if grad is None else grad * grad_weighted.to(grad.dtype) for grad in grads]
        grad_head, *grad_hiddens = grads
        if grad_head is not None:
            grad_head = grad_head.to(ctx.head_dtype)
        return None, None, None, None, grad_head, *grad_hiddens


@dataclass(frozen=True)
class _Scratch:
    """Memory for one chunk's logits, written again and again: fresh pages would cost as much as the softmax."""

    rows: int
    """Rows of one chunk."""
    logits: Float[Tensor, "chunk vocab"]
    """In the dtype of the matrix products."""
    wide: Float[Tensor, "chunk vocab"]
    """In float32 or wider; the same tensor as `logits` where that is wide enough."""

    @classmethod
    def allocate(cls, head: Tensor, rows: int, chunk_bytes: int | None, wide: torch.dtype) -> "_Scratch":
        """Equal chunks of at most `chunk_bytes`."""
        narrow_bytes = head.element_size() if head.dtype != wide else 0
        row_bytes = head.shape[0] * (wide.itemsize + narrow_bytes)
        if chunk_bytes is None and head.device.type == "cpu":
            chunk_bytes = min(CPU_CHUNK_BYTES, CPU_CHUNK_ROWS * row_bytes)
        most = max(1, (chunk_bytes or ACCELERATOR_CHUNK_BYTES) // row_bytes)
        chunk = math.ceil(rows / math.ceil(rows / most)) if rows else 1
        logits = head.new_empty((chunk, head.shape[0]))
        return cls(chunk, logits, logits if head.dtype == wide else torch.empty_like(logits, dtype=wide))

    def fill(self, state: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (n,) of n rows, and softmax minus one-hot (n, V), which lives in this scratch memory."""
        rows = state.shape[0]
        column = targets.unsqueeze(1)
        logits, wide = self.logits[:rows], self.wide[:rows]
        torch.mm(state, head.t(), out=logits)
        highest = logits.amax(1, keepdim=True).to(wide.dtype)
        wanted = logits.gather(1, column).to(wide.dtype)
        torch.softmax(logits, 1, dtype=wide.dtype, out=wide)
        # Both terms are at least 0 and neither cancels, however sure the model is.
        losses = (highest - wanted) - wide.amax(1, keepdim=True).log()
        wide.scatter_(1, column, torch.expm1(-losses))
        return losses.squeeze(1), wide

    def narrow(self, difference: Tensor) -> Tensor:
        """The same numbers in the dtype of the matrix products."""
        return difference if self.wide is self.logits else self.logits[: difference.shape[0]].copy_(difference)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """total += left @ right, or total = left @ right, rounded to the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if overwrite else 1)
    elif overwrite:
        total.copy_(left @ right)
    else:
        total += left @ right
