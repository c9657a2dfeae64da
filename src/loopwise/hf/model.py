"""A `LoopedLM` as a transformers model: `forward`, `generate` with `num_loops`, `labels`, and folders both ways.

Axes: B batch, T tokens, P tokens seen with those before, D width, V vocabulary.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from loopwise.engine.answer import Completion
from loopwise.engine.sampling import Sampling
from loopwise.engine.write import generate
from loopwise.errors import CheckpointError, ConfigError, InputError
from loopwise.hf import files
from loopwise.hf.cache import CachedMemory, LoopedCache, cached_mask
from loopwise.hf.config import HuginnRavenConfig, LoopedPreTrainedConfig, LoopwiseConfig, OuroConfig
from loopwise.hf.loss import check_progress, default_objective, labelled_run, resolve_objective
from loopwise.hub.family import Origin
from loopwise.loops.drivers import unroll
from loopwise.models.looped_lm import LoopedLM, count_positions, initialise
from loopwise.objectives import Objective, build_objective

_EXIT_WORDS = ("exit", "exit_rule", "exit_threshold", "early_exit_threshold", "max_loops", "min_loops")
Start = int | Literal["zero"] | Tensor | None


class LoopedForCausalLM(PreTrainedModel, GenerationMixin):
    """A looped language model of any family we read; `AutoModelForCausalLM` finds the class of each family.

    Every token runs the same number of loops here, `num_loops`: transformers' `generate` has no place for a token that
    stops early. `loop_generate` has.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    accepts_loss_kwargs = True
    config: LoopedPreTrainedConfig

    def __init__(self, config: LoopedPreTrainedConfig, model: LoopedLM | None = None) -> None:
        """A model of this configuration.

        Args:
            config: what to build.
            model: the weights; None draws them anew from torch's default generator.
        """
        super().__init__(config)
        if model is None:
            model = LoopedLM(config.looped)
            if model.embed.weight.device.type != "meta":
                initialise(model, seed=int(torch.randint(2**62, ())))
            model.origin = Origin(family=config.model_type, config=config.to_dict())
        self.model = model
        self.gradient_checkpointing = False
        self.logits_in_training = False
        """Whether a training pass with labels returns logits too, (B, T, V) of the last loop; the loss needs none."""
        self.progress: float | None = None
        """Share of the training that is done, 0 to 1, for objectives that change on the way."""
        self._objective: str | Objective = default_objective(model)
        # The whole core, not its blocks: sharded training then gathers its weights once per pass through it.
        self._no_split_modules = ["Stack"]
        self.post_init()  # type: ignore[no-untyped-call]  # transformers leaves it untyped

    def init_weights(self) -> None:
        """Nothing: the weights are there."""

    @property
    def objective(self) -> Objective:
        """What `labels` are judged by; set it to a text such as "last" or "expected:beta=0.05".

        By default Ouro's stage I ("expected") where there is an exit gate, else "last". It runs `config.num_loops`
        loops, unless the text names its own or a call gives `num_loops`.
        """
        return resolve_objective(self._objective, loops=self.config.num_loops)

    @objective.setter
    def objective(self, given: str | Objective) -> None:
        found = resolve_objective(given, loops=self.config.num_loops)
        if found.needs_hazards and self.model.gate is None:
            raise ConfigError(f"objective {found.name} needs an exit gate, and this model has none; try last")
        self._objective = given

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        num_loops: int | None = None,
        start: Start = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run every token for `num_loops` loops.

        Args:
            input_ids: (B, T); with a cache, the new tokens alone.
            attention_mask: (B, P), 0 at padding, on either side.
            position_ids: (B, T) or (1, T); by default real tokens are counted. Without `attention_mask` a position
                that does not follow the one before it begins another document, which attention does not cross.
            past_key_values: a `LoopedCache`.
            labels: (B, T), as `input_ids`, -100 where nothing is asked; the loss is that of `objective`.
            use_cache: whether to return a cache to go on from.
            output_hidden_states: whether to return the prelude's output and the state after each loop.
            return_dict: False returns a tuple.
            logits_to_keep: compute the last so many logits, or those at these indices; 0 for all.
            num_items_in_batch: labels of the whole optimiser step, as `Trainer` counts them.
            num_loops: None means `config.num_loops`.
            start: start state of random-start models: a seed, "zero" or a tensor; None for the model's own, and for
                new noise in a training pass with labels.

        Raises:
            ConfigError: for what a looped model cannot give (attention weights, another kind of cache).
            InputError: for token ids, masks, positions or labels that do not fit.
        """
        if input_ids is None or inputs_embeds is not None:
            raise InputError("a looped model reads token ids; give input_ids and no inputs_embeds")
        if output_attentions:
            raise ConfigError("output_attentions=True: attention weights are never formed; leave it out")
        self._check_adapters()
        padding_mask = _padding_mask(attention_mask)
        loops = self.config.num_loops if num_loops is None else num_loops
        cache = self._cache(past_key_values, use_cache, loops)
        if labels is not None and cache is not None:
            raise ConfigError("labels need the whole sequence at once; leave out past_key_values and use_cache")
        if labels is not None and labels.shape != input_ids.shape:
            raise InputError(
                f"labels of shape {tuple(labels.shape)} for tokens of shape {tuple(input_ids.shape)}; give equal shapes"
            )
        before = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (len(input_ids), before + input_ids.shape[1]):
            raise InputError(
                f"attention_mask of shape {tuple(attention_mask.shape)}; needed is "
                f"{(len(input_ids), before + input_ids.shape[1])}, the tokens in the cache included"
            )
        positions = None if position_ids is None else position_ids.expand(input_ids.shape)
        self._check_length(input_ids, positions, before)
        documents = None
        if positions is not None and attention_mask is None and before == 0:
            documents = _documents(positions)

        loss, logits = None, None
        if labels is not None:
            objective = self.objective
            run = labelled_run(
                self.model,
                objective if num_loops is None else build_objective(objective, loops=num_loops),
                tokens=input_ids,
                labels=labels,
                padding_mask=padding_mask,
                documents=documents,
                positions=positions,
                start=start,
                training=self.training,
                progress=check_progress(objective, self.progress) if self.training else self.progress or 0.0,
                expected_items=num_items_in_batch,
                recompute=self.gradient_checkpointing and self.training,
                keep_states=bool(output_hidden_states),
            )
            loss, hidden, states = run.loss, run.hidden, run.states
        else:
            if cache is None:
                context = self.model.encode(
                    input_ids, padding_mask=padding_mask, documents=documents, positions=positions
                )
            else:
                if documents is not None:
                    raise InputError("positions that begin anew are several documents; a cache holds one per row")
                context = self._encode_cached(input_ids, padding_mask, positions, cache)
            collect: tuple[Literal["states"], ...] = ("states",) if output_hidden_states else ()
            out = unroll(self.model, context, loops=loops, start=start, collect=collect)
            hidden = self.model.read(out.state, context)
            states = (context.injected, *out.states) if output_hidden_states and out.states is not None else ()
        if labels is None or not self.training or self.logits_in_training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = F.linear(hidden[:, kept], self.model.head_weight)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=states if output_hidden_states else None
        )
        return output.to_tuple() if return_dict is False else output

    def _check_adapters(self) -> None:
        """Refuse adapters on matrices that are read without being called: they would be ignored."""
        for name, module in (("head", self.model.head), ("gate", self.model.gate), ("embed", self.model.embed)):
            read = name != "embed" or self.model.head is None
            if read and hasattr(module, "base_layer"):
                raise ConfigError(
                    f"an adapter on {name!r} would be ignored; leave it out (target_modules=loopwise.hf.CORE_LINEAR)"
                )

    def _cache(self, given: Cache | None, use_cache: bool | None, loops: int) -> LoopedCache | None:
        if given is not None and not isinstance(given, LoopedCache):
            raise ConfigError(
                f"past_key_values is a {type(given).__name__}; a looped model needs a slot per loop and layer: "
                "give loopwise.hf.LoopedCache(), or use_cache=True"
            )
        if given is None and not use_cache:
            return None
        cache = LoopedCache() if given is None else given
        cache.claim(loops)
        return cache

    def _check_length(self, tokens: Tensor, positions: Tensor | None, before: int) -> None:
        count, most = before + tokens.shape[1], self.model.config.max_positions
        # Positions are looked at only when they can matter: on an accelerator that makes the host wait.
        if count > most and (positions is None or int(positions.max()) >= most):
            raise InputError(f"{count} tokens were given; this model's context is {most}: shorten the input")

    def _encode_cached(
        self,
        tokens: Int[Tensor, "batch new"],
        padding_mask: Bool[Tensor, "batch seen"] | None,
        positions: Int[Tensor, "batch new"] | None,
        cache: LoopedCache,
    ) -> Any:
        new = tokens.shape[1]
        seen = cache.get_seq_length() + new
        if positions is None:
            everything = tokens.new_zeros(len(tokens), seen)
            positions = count_positions(everything, padding_mask)[:, -new:]
        mask = cached_mask(new, seen, padding_mask, tokens.device)
        memory = CachedMemory(cache=cache, config=self.model.config, mask=mask)
        return self.model.encode(tokens, positions=positions, memory=memory)

    def loop_generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | None = None,
        *,
        policy: str | None = None,
        prompt_depth: str = "full",
    ) -> list[Completion]:
        """Answer prompts token by token with exits: `Sampling(exit="hazard:0.6")` stops each token when it is ready.

        This is `loopwise.generate`; see there.
        """
        return generate(self.model, prompts, sampling, policy=policy, prompt_depth=prompt_depth)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        for word in _EXIT_WORDS:
            if model_kwargs.get(word) is not None:
                raise ConfigError(
                    f"{word}={model_kwargs[word]!r}: transformers' generate runs every token for num_loops loops; "
                    'for exits per token type model.loop_generate(prompts, loopwise.Sampling(exit="hazard:0.6"))'
                )
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]  # its `self` is a class made for typing

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation={generation_config.cache_implementation!r}: a looped model keeps a slot per "
                "loop and layer in a LoopedCache; leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LoopedCache()
            return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]  # its `self` is a class made for typing
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        asked = gradient_checkpointing_func
        settings = asked.keywords if isinstance(asked, partial) else {}
        plain = (asked.func if isinstance(asked, partial) else asked) is checkpoint
        if enable and not (plain and settings.get("use_reentrant") in (None, False) and len(settings) <= 1):
            raise ConfigError(f"gradient checkpointing with {settings}: each loop is recomputed; no option is taken")
        if every_n_layers != 1:
            raise ConfigError(f"every_n_layers={every_n_layers}: each loop is recomputed as a whole; leave it out")
        self.gradient_checkpointing = enable

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.embed
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        head: nn.Module | None = self.model.head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **options: Any) -> Any:
        embeddings = super().resize_token_embeddings(*args, **options)
        self.model.config = replace(self.model.config, vocab_size=len(self.model.embed.weight))
        return embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """The model in a folder or under a hub id, with its tokenizer's and generation settings.

        Names and shapes of all tensors are checked; no code of the checkpoint is run.

        Args:
            pretrained_model_name_or_path: see `loopwise.load`.
            options: `dtype`, `device_map` (one device, or "auto" for the accelerator if there is one), `objective`,
                `generation_config`, `config`, keys of config.json to change (those that leave the tensors as they
                are), and the hub's `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            ConfigError: for an option that is none of these.
            NotFoundError: when there is no such checkpoint.
            CheckpointError: when its files are not what its config.json implies.
        """
        if args:
            raise ConfigError("from_pretrained takes a folder or a hub id, and options by name")
        loaded = files.load_checkpoint(pretrained_model_name_or_path, options)
        if not issubclass(loaded.config.__class__, cls.config_class or LoopedPreTrainedConfig):
            raise CheckpointError(
                f"{pretrained_model_name_or_path} is of family {loaded.config.model_type}; "
                f"{cls.__name__} does not read it: use AutoModelForCausalLM"
            )
        chosen = MODELS[loaded.config.model_type] if cls is LoopedForCausalLM else cls
        wrapped = chosen(loaded.config, model=loaded.model)
        wrapped.generation_config = loaded.generation_config
        if loaded.objective is not None:
            wrapped.objective = loaded.objective
        wrapped.train(False)
        return wrapped

    def save_pretrained(  # type: ignore[override]  # what is left out here is refused by name
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> None:
        """Write config.json, weights, tokenizer and generation settings, in the names of the model's own family.

        `loopwise.load` and `AutoModelForCausalLM.from_pretrained` both read the folder.

        Args:
            save_directory: the folder; made when it is not there.
            is_main_process: False writes nothing.
            state_dict: weights to write instead of the model's own, by their names in it.
            max_shard_size: files larger than this are split.

        Raises:
            ConfigError: for an option that is not taken, or while adapters are not merged.
            StorageError: when the disk refuses.
        """
        unknown = sorted(name for name, value in options.items() if value not in (None, False))
        if unknown:
            raise ConfigError(f"save_pretrained does not take {', '.join(unknown)}; see its documentation")
        if is_main_process:
            files.save_checkpoint(self, Path(save_directory), state_dict, max_shard_size)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Also takes the tensors of a saved file, in the family's names, as `Trainer` does when it resumes."""
        if state_dict.keys() & self.state_dict().keys() or not state_dict:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        return files.load_family_tensors(self.model, self.config.model_type, state_dict, strict=strict)


def _padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """True where a token is real; None when every token is."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise InputError(f"attention_mask of {attention_mask.dim()} axes; give (batch, tokens), 1 where one is real")
    real = attention_mask.bool()
    return None if bool(real.all()) else real


def _documents(positions: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"] | None:
    """A number for each run of successive positions; None when each row is one run from 0."""
    ahead = torch.ones_like(positions, dtype=torch.bool)
    ahead[:, 1:] = positions[:, 1:] == positions[:, :-1] + 1
    if bool(ahead.all()):
        return None
    return (~ahead).cumsum(-1)


class LoopwiseForCausalLM(LoopedForCausalLM):
    """Our own family."""

    config_class = LoopwiseConfig


class OuroForCausalLM(LoopedForCausalLM):
    """Ouro."""

    config_class = OuroConfig


class RavenForCausalLM(LoopedForCausalLM):
    """Huginn and the retrofitted Raven models."""

    config_class = HuginnRavenConfig


MODELS: dict[str, type[LoopedForCausalLM]] = {
    "loopwise": LoopwiseForCausalLM,
    "ouro": OuroForCausalLM,
    "huginn_raven": RavenForCausalLM,
}
"""Family to model class."""


def wrap(model: LoopedLM) -> LoopedForCausalLM:
    """A model that is already loaded, or was built here, as a transformers model; the weights are shared.

    Raises:
        ConfigError: when its family cannot hold its shape.
    """
    family = "loopwise" if model.origin is None else model.origin.family
    return MODELS[family](files.config_of(model), model=model)
