"""What a Continuous Thought Machine is made of."""

from dataclasses import dataclass
from typing import Literal, get_args

from loopwise.errors import ConfigError
from loopwise.nn.synchronisation import Pairing, count_pairs

NeuronModelKind = Literal["deep", "shallow", "none"]
BackboneKind = Literal["given", "parity", "convnet", "resnet18-1", "resnet18-2", "resnet34-1", "resnet34-2"]
PositionKind = Literal["none", "rotation"]


@dataclass(frozen=True, kw_only=True)
class CTMConfig:
    """Sizes and kinds of a `CTM`; the authors' names stand in brackets."""

    ticks: int
    """Loops in training (`iterations`)."""
    neurons: int
    """D, width of the thinking part (`d_model`)."""
    width: int
    """Width of attended features (`d_input`)."""
    heads: int
    """Attention heads."""
    memory: int
    """M, past pre-activations that a neuron reads (`memory_length`)."""
    classes: int
    """Classes at each place of an answer."""
    places: int | None = None
    """Places of an answer, such as positions of a sequence or moves of a route; None: one class is the answer."""
    neuron_models: NeuronModelKind = "deep"
    """Networks that neurons read their past with: two layers, one, or none, where a neuron's activity is its newest
    pre-activation (the paper's ablation; `memory` is then 1)."""
    neuron_hidden: int | None = 16
    """Hidden features of deep neuron models (`memory_hidden_dims`); None for other kinds."""
    neuron_norm: bool = False
    """Whether a neuron's past is normalised before each of its layers (`do_layernorm_nlm`)."""
    synapse_depth: int = 1
    """1: one gated layer. More: a U-Net with so many widths."""
    pairing: Pairing = "random-pairing"
    """Which neurons' synchronisation is read: `first-last` (all pairs among the first for answers, among the last for
    attention), `random` (all pairs of two drawn sets), `random-pairing` (drawn pair by pair), or `none`, where the
    neurons' activity itself is read (the paper's ablation without synchronisation)."""
    out_neurons: int = 0
    """Neurons, or pairs in `random-pairing`, that the answer reads (`n_synch_out`); 0 for pairing `none` only."""
    action_neurons: int = 0
    """The same for attention (`n_synch_action`)."""
    self_pairs: int = 0
    """Pairs of a neuron with itself in `random-pairing` (`n_random_pairing_self`)."""
    backbone: BackboneKind = "given"
    """What makes features of the input: nothing (`given`: (N, channels, places...)), an embedding of +-1 (`parity`), a
    small convolutional network, or the first stages of a ResNet as the authors' maze models have it."""
    channels: int | None = None
    """Channels of the input; None for `parity`, whose input has none."""
    backbone_width: int | None = None
    """Channels of the `convnet`; None for other backbones."""
    halvings: int = 0
    """How often the `convnet` halves its image."""
    positions: PositionKind = "none"
    """`rotation`: a place's share of half a turn, projected and added (`custom-rotational-1d`)."""
    dropout: float = 0.0
    """In synapses and attention, in training."""
    neuron_dropout: float | None = None
    """In neuron models; None: the same."""

    def __post_init__(self) -> None:
        for name in ("ticks", "neurons", "width", "heads", "memory", "synapse_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; give 1 or more")
        if self.classes < 2:
            raise ConfigError(f"classes={self.classes}; a choice needs 2 or more")
        if self.places is not None and self.places < 1:
            raise ConfigError(f"places={self.places}; give 1 or more, or none for answers of one class")
        if self.width % self.heads:
            raise ConfigError(f"heads={self.heads} do not divide width={self.width}; give heads that do, such as 4")
        for name, kinds in (
            ("neuron_models", NeuronModelKind),
            ("pairing", Pairing),
            ("backbone", BackboneKind),
            ("positions", PositionKind),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{name}={getattr(self, name)!r}; allowed are {', '.join(get_args(kinds))}")
        for name, share in (("dropout", self.dropout), ("neuron_dropout", self.neuron_dropout or 0.0)):
            if not 0.0 <= share < 1.0:
                raise ConfigError(f"{name}={share}; give a share from 0 up to, not including, 1")
        self._check_neuron_models()
        self._check_pairing()
        self._check_backbone()

    def _check_neuron_models(self) -> None:
        if (self.neuron_models == "deep") != (self.neuron_hidden is not None):
            wanted = "a number, such as 16" if self.neuron_models == "deep" else "none"
            raise ConfigError(
                f"neuron_hidden={self.neuron_hidden} with neuron_models={self.neuron_models!r}; give {wanted}"
            )
        if self.neuron_hidden is not None and self.neuron_hidden < 1:
            raise ConfigError(f"neuron_hidden={self.neuron_hidden}; give 1 or more")
        if self.neuron_models == "none" and (self.memory != 1 or self.neuron_norm or self.neuron_dropout is not None):
            raise ConfigError(
                "neuron_models='none' reads no past; give memory=1, neuron_norm=false, neuron_dropout=none"
            )

    def _check_pairing(self) -> None:
        chosen = (self.out_neurons, self.action_neurons)
        if self.pairing == "none":
            if chosen != (0, 0):
                raise ConfigError(
                    f"pairing='none' chooses no neurons; leave out out_neurons and action_neurons={chosen}"
                )
        elif min(chosen) < 1:
            raise ConfigError(
                f"out_neurons={self.out_neurons}, action_neurons={self.action_neurons}: pairing={self.pairing!r} needs "
                "1 or more of each, such as 32"
            )
        if self.pairing == "first-last" and sum(chosen) > self.neurons:
            raise ConfigError(
                f"out_neurons + action_neurons = {sum(chosen)} of neurons={self.neurons}: with pairing='first-last' "
                f"they may not overlap; give at most {self.neurons} together"
            )
        most = min(chosen) if self.pairing == "random-pairing" else 0
        if not 0 <= self.self_pairs <= most:
            raise ConfigError(f"self_pairs={self.self_pairs} with pairing={self.pairing!r}; allowed is 0 to {most}")

    def _check_backbone(self) -> None:
        if (self.backbone == "parity") != (self.channels is None) or (self.channels or 1) < 1:
            wanted = "none: its input has no channels" if self.backbone == "parity" else "1 or more"
            raise ConfigError(f"channels={self.channels} with backbone={self.backbone!r}; give {wanted}")
        convnet = self.backbone == "convnet"
        if convnet != (self.backbone_width is not None) or (self.backbone_width or 1) < 1:
            wanted = "1 or more, such as 32" if convnet else "none"
            raise ConfigError(f"backbone_width={self.backbone_width} with backbone={self.backbone!r}; give {wanted}")
        if self.halvings < 0 or (self.halvings and not convnet):
            raise ConfigError(
                f"halvings={self.halvings} with backbone={self.backbone!r}; only a convnet halves, 0 or more"
            )
        if self.positions != "none" and self.backbone not in ("parity", "given"):
            raise ConfigError(
                f"positions={self.positions!r} with backbone={self.backbone!r}; these positions are along one line, so "
                "give positions='none'"
            )

    @property
    def out_size(self) -> int:
        """Numbers that the answer is read from."""
        return self._size(self.out_neurons)

    @property
    def action_size(self) -> int:
        """Numbers that a query is made of."""
        return self._size(self.action_neurons)

    def _size(self, chosen: int) -> int:
        return self.neurons if self.pairing == "none" else count_pairs(self.pairing, chosen)
