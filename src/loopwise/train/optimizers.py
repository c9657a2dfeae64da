"""Optimisers: AdamW for everything, or Muon for the matrices and AdamW for the rest; clipping; skipped steps.

Muon replaces a matrix's momentum by (nearly) the closest orthogonal matrix, found by a Newton-Schulz iteration
(K. Jordan 2024, "Muon: an optimizer for hidden layers"), here scaled so that an update has the size of AdamW's and
the same learning rate and decay fit (J. Liu et al. 2025, arXiv 2502.16982, equation 4).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.errors import CheckpointError, ConfigError

NAMES = ("adamw", "muon")
EMBEDDINGS = frozenset({"embed", "embedding", "embeddings", "embed_tokens", "wte"})
HEADS = frozenset({"head", "lm_head"})
GATES = frozenset({"gate"})
FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
# Five steps of the quintic a X + b (X X^T) X + c (X X^T)^2 X with K. Jordan's coefficients, as torch.optim.Muon.
QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimiser moves the weights, and how far."""

    name: str = "adamw"
    """`adamw`, or `muon`: Muon for the matrices inside the layers, AdamW for everything else."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and second moment (Ouro, table 1; Huginn, section 4)."""
    eps: float = 1e-8
    """AdamW's guard against division by zero."""
    weight_decay: float = 0.1
    """Decoupled decay, times the learning rate. Never on norms, biases and the exit gate."""
    decay_embeddings: bool = False
    """Whether the token embeddings (and a head tied to them) decay too."""
    clip: float | None = 1.0
    """Largest global norm of the gradients; larger ones are scaled down to it. None: no clipping."""
    muon_scale: float = 1.0
    """Muon's learning rate as a multiple of AdamW's."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov)."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"optimizer.name={self.name!r} is unknown; use one of: {', '.join(NAMES)}")
        for field in ("eps", "muon_scale"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"optimizer.{field}={value}: use a number above 0, such as 3e-4")
        for field, value in (
            ("betas", self.betas[0]),
            ("betas", self.betas[1]),
            ("muon_momentum", self.muon_momentum),
        ):
            if not 0.0 <= value < 1.0:
                raise ConfigError(
                    f"optimizer.{field}={getattr(self, field)}: use numbers from 0 up to, not including, 1"
                )
        if not self.weight_decay >= 0:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay}: use 0 or more")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"optimizer.clip={self.clip}: use a norm above 0, or null for no clipping")
        if self.name != "muon" and (self.muon_scale, self.muon_momentum) != (1.0, 0.95):
            raise ConfigError("optimizer.muon_scale and muon_momentum have no effect with name=adamw; leave them out")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimiser step did."""

    gradient_norm: float
    """Global L2 norm of the gradients before clipping; not finite if the step was skipped."""
    skipped: bool
    """True if a gradient was not finite: weights and optimiser state are then untouched."""


def role(name: str, parameter: Tensor) -> str:
    """What a parameter is, by its dotted name: `embedding`, `head`, `gate`, `vector` (norms, biases) or `matrix`."""
    components = name.split(".")
    # The bias of several heads is stored as a matrix (attention.qk_bias) and is still a bias.
    if parameter.ndim < 2 or components[-1].endswith("bias"):
        return "vector"
    for kind, known in (("gate", GATES), ("embedding", EMBEDDINGS), ("head", HEADS)):
        if not known.isdisjoint(components):
            return kind
    return "matrix"


def fused_blocks(*, heads: int, kv_heads: int, head_width: int, mlp_width: int) -> dict[str, tuple[int, ...]]:
    """Rows of the logical matrices inside fused ones, by parameter-name suffix, for `build_optimizer(blocks=...)`.

    `qkv.weight` ((heads + 2 kv_heads) head_width, width) holds queries, keys and values;
    `gate_up.weight` (2 mlp_width, width) holds the gate and the up projection.
    """
    return {
        "qkv.weight": (heads * head_width, kv_heads * head_width, kv_heads * head_width),
        "gate_up.weight": (mlp_width, mlp_width),
    }


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    *,
    blocks: Mapping[str, tuple[int, ...]] | None = None,
) -> "Optimizer":
    """The optimiser of a run over the parameters that require gradients.

    `blocks` says which parameters, by suffix of their name, are several matrices stacked by rows; Muon treats each
    on its own (see `fused_blocks`). A three-dimensional parameter (experts, out, in) is one matrix per expert.
    Raises `ConfigError` if nothing is trainable, if a suffix fits no parameter (frozen ones count), or if blocks do
    not add up to the rows of their parameter.
    """
    known = dict(named_parameters)
    for suffix in blocks or {}:
        if not any(_ends(name, suffix) for name in known):
            raise ConfigError(f"no parameter is named ...{suffix}; correct the blocks (see fused_blocks)")
    parameters = {name: parameter for name, parameter in known.items() if parameter.requires_grad}
    if not parameters:
        raise ConfigError("no parameter requires a gradient; unfreeze the model or choose an objective that trains it")
    muon = {
        name: parameter
        for name, parameter in parameters.items()
        if config.name == "muon" and role(name, parameter) == "matrix" and parameter.ndim in (2, 3)
    }
    pieces = [piece for name, parameter in muon.items() for piece in _split(name, parameter, blocks or {})]
    adamw = {name: parameter for name, parameter in parameters.items() if name not in muon}
    return Optimizer(parameters, adamw, pieces, config)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One logical matrix inside a parameter, seen by Muon as a parameter of its own."""

    name: str
    """Name of the parameter, with its rows in brackets if it is a part."""
    whole: nn.Parameter
    """The parameter that the model holds."""
    view: Callable[[Tensor], Tensor]
    """Cuts the matrix (as a view) out of the parameter or its gradient."""
    proxy: nn.Parameter
    """Shares its memory with that part of `whole`; `whole` itself if that is the one matrix."""

    def refresh(self) -> None:
        """Points the proxy at the present weights and gradient, wherever the model has put them."""
        if self.proxy is self.whole:
            return
        self.proxy.data = self.view(self.whole.detach())
        self.proxy.grad = None if self.whole.grad is None else self.view(self.whole.grad)


class Optimizer:
    """AdamW, with Muon beside it for the pieces; steps both, clips, skips, and knows its state by parameter name.

    It has no rate of its own: each step is told one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        adamw: Mapping[str, nn.Parameter],
        pieces: list[Piece],
        config: OptimizerConfig,
    ) -> None:
        self.config = config
        self.skipped = 0
        """Steps skipped so far because a gradient was not finite."""
        self._parameters = list(parameters.values())
        self._pieces = pieces
        self._members: list[tuple[torch.optim.Optimizer, list[str], float]] = []
        if adamw:
            decayed = [name for name in adamw if _decays(role(name, adamw[name]), config)]
            others = [name for name in adamw if name not in decayed]
            groups = [
                {"params": [adamw[name] for name in names], "weight_decay": decay}
                for names, decay in ((decayed, config.weight_decay), (others, 0.0))
                if names
            ]
            fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in adamw.values())
            rest = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused, foreach=not fused)
            self._members.append((rest, decayed + others, 1.0))
        if pieces:
            on_cpu = all(piece.whole.device.type == "cpu" for piece in pieces)
            # torch's Muon iterates in bfloat16, which many CPUs only emulate.
            kind = WideMuon if on_cpu else torch.optim.Muon
            matrices = kind(
                [piece.proxy for piece in pieces],
                lr=0.0,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            self._members.append((matrices, [piece.name for piece in pieces], config.muon_scale))

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in [*self._parameters, *(piece.proxy for piece in self._pieces)]:
            parameter.grad = None

    def step(self, learning_rate: float) -> StepReport:
        """Clips the gradients in place and applies one update at `learning_rate`.

        If any gradient is NaN or infinite (or their norm overflows float32), nothing changes but the count `skipped`.
        Parameters without a gradient stay as they are.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = gradient_norm(gradients)
        if not math.isfinite(norm):
            self.skipped += 1
            return StepReport(gradient_norm=norm, skipped=True)
        if self.config.clip is not None and norm > self.config.clip:
            torch._foreach_mul_(gradients, self.config.clip / norm)
        for piece in self._pieces:
            piece.refresh()
        for member, _, scale in self._members:
            for group in member.param_groups:
                group["lr"] = learning_rate * scale
            member.step()
        return StepReport(gradient_norm=norm, skipped=False)

    def state(self) -> dict[str, Any]:
        """Everything a resume needs, by parameter name; holds the live tensors (for `checkpoint.flatten`)."""
        return {
            "skipped": self.skipped,
            "parameters": self._names(),
            "moments": {
                name: dict(member.state[parameter])
                for member, names, _ in self._members
                for name, parameter in zip(names, _parameters_of(member), strict=True)
                if parameter in member.state
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over a state written by `state`, bit for bit; rates, betas and decay stay those of this config.

        Raises `CheckpointError` if the state belongs to other parameters.
        """
        different = set(self._names()) ^ set(state["parameters"])
        if different:
            few = ", ".join(sorted(different)[:3])
            raise CheckpointError(
                f"the optimiser state is of other parameters ({len(different)} differ: {few}); "
                "resume with the configuration of the run, or start a new run with init=PATH"
            )
        self.skipped = state["skipped"]
        moments = state["moments"]
        for member, names, _ in self._members:
            packed = member.state_dict()
            packed["state"] = {
                # Cloned, so that training never writes into the tensors of the checkpoint.
                index: {
                    key: value.clone() if isinstance(value, Tensor) else value for key, value in moments[name].items()
                }
                for index, name in enumerate(names)
                if name in moments
            }
            member.load_state_dict(packed)

    def _names(self) -> list[str]:
        return [name for _, names, _ in self._members for name in names]


def gradient_norm(gradients: list[Tensor]) -> float:
    """Global L2 norm in float32, or float64 if a gradient is float64; 0 for an empty list."""
    if not gradients:
        return 0.0
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    norms = torch._foreach_norm(gradients, 2, wide)
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))


def orthogonalize(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Nearly the closest semi-orthogonal matrix, in float32 or wider.

    Singular values end between about 0.7 and 1.2, except those below some 1% of the matrix's norm, which end lower.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    x = wide.T if wide.shape[0] > wide.shape[1] else wide
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if wide.shape[0] > wide.shape[1] else x


class WideMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` with the iteration in float32 (or the parameter's dtype, if wider) instead of bfloat16.

    Same formulas, same names in its state: a checkpoint moves between the two.
    """

    def __init__(
        self, params: list[nn.Parameter], *, lr: float, weight_decay: float, momentum: float, adjust_lr_fn: str
    ) -> None:
        if adjust_lr_fn != "match_rms_adamw":
            raise ConfigError(f"adjust_lr_fn={adjust_lr_fn!r} is not supported; use 'match_rms_adamw'")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not used in this package
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - momentum)
                update = orthogonalize(parameter.grad.lerp(buffer, momentum))
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-rate * 0.2 * math.sqrt(max(parameter.shape)))


def _decays(kind: str, config: OptimizerConfig) -> bool:
    return kind in ("matrix", "head") or (kind == "embedding" and config.decay_embeddings)


def _parameters_of(member: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in member.param_groups for parameter in group["params"]]


def _split(name: str, parameter: nn.Parameter, blocks: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
    rows = next((sizes for suffix, sizes in blocks.items() if _ends(name, suffix)), None)
    height = parameter.shape[-2]
    if rows is not None and sum(rows) != height:
        raise ConfigError(f"{name} has {height} rows, but its blocks {rows} add up to {sum(rows)}; correct the blocks")
    for expert in range(parameter.shape[0]) if parameter.ndim == 3 else (None,):
        start = 0
        for size in rows or (height,):
            view = _cut(expert, start, size)
            label = name if expert is None else f"{name}[{expert}]"
            label = f"{label}[{start}:{start + size}]" if rows else label
            proxy = parameter if label == name else nn.Parameter(view(parameter.detach()))
            yield Piece(name=label, whole=parameter, view=view, proxy=proxy)
            start += size


def _ends(name: str, suffix: str) -> bool:
    return f".{name}".endswith(f".{suffix}")


def _cut(expert: int | None, start: int, size: int) -> Callable[[Tensor], Tensor]:
    def view(tensor: Tensor) -> Tensor:
        matrix = tensor if expert is None else tensor[expert]
        return matrix[start : start + size]

    return view
