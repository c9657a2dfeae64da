"""From a configuration to the data and the model that a run begins with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loopwise.configuration import to_dict
from loopwise.errors import ConfigError
from loopwise.hub.checkpoints import inspect, load
from loopwise.hub.family import Origin
from loopwise.hub.tokenizer import Tokenizer
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.nn.noise import integer
from loopwise.objectives.registry import build_objective
from loopwise.tasks.corpus import Corpus
from loopwise.tasks.pointer_chasing import PointerChasing
from loopwise.train.batches import BatchSource
from loopwise.train.sources import PackedSource, PointerChasingSource
from loopwise.train.config import TrainConfig
from loopwise.train.token_store import TokenStore, token_store

_TOKENIZER_SAMPLE_BYTES = 20 * 10**6


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads."""

    config: TrainConfig
    vocab_size: int
    """Ids that the data can hold."""
    tokenizer: Tokenizer | None = None
    """None for tasks made of ids."""
    train: TokenStore | None = None
    validation: TokenStore | None = None

    def source(self, stage: int) -> BatchSource:
        """The batches of one stage; it begins where the stage before it stopped reading."""
        config = self.config
        if self.train is None:
            seed = integer(config.seed, f"stage {stage}")
            return PointerChasingSource(PointerChasing(config.pointer_chasing), seed=seed)
        here = config.stages[stage]
        read = sum(s.steps * s.micro_batches * s.rows * s.context for s in config.stages[:stage])
        return PackedSource(
            train=self.train,
            validation=self.validation,
            vocab_size=self.vocab_size,
            length=here.context,
            seed=config.seed,
            micros=here.micro_batches,
            first_row=-(-read // here.context),
        )

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text behind each token whose loss counts; None for tasks."""
        return None if self.train is None else self.train.bytes_per_token

    def identity(self) -> list[dict[str, Any]]:
        """What decides every batch of the run, as JSON."""
        return [self.source(stage).state() for stage in range(len(self.config.stages))]


def build_data(config: TrainConfig, *, cache: Path) -> Data:
    """Read and pack the corpus, or set up the task.

    Raises:
        UserError: for a missing, empty or broken corpus, or a tokenizer that does not exist.
    """
    if config.task == "pointer-chasing":
        return Data(config=config, vocab_size=PointerChasing(config.pointer_chasing).vocab_size)
    corpus = Corpus(config.corpus, limit=config.corpus_bytes)
    tokenizer = _tokenizer(config, corpus, cache)
    return Data(
        config=config,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        train=token_store(corpus, tokenizer, cache, part="train"),
        validation=token_store(corpus, tokenizer, cache, part="validation"),
    )


def _tokenizer(config: TrainConfig, corpus: Corpus, cache: Path) -> Tokenizer:
    if config.init is not None:
        held = inspect(config.init).tokenizer
        if held is None:
            raise ConfigError(f"{config.init} has no tokenizer.json, so text cannot be read for it; put one beside it")
        return held
    if (cache / "tokenizer" / "tokenizer.json").is_file():
        return Tokenizer.load(cache / "tokenizer")
    kind, _, size = config.tokenizer.partition(":")
    if config.tokenizer == "bytes":
        tokenizer = Tokenizer.bytes()
    elif kind == "bpe" and size.isdigit():
        tokenizer = Tokenizer.train(_sample(corpus), int(size))
    elif Path(config.tokenizer).is_dir():
        tokenizer = Tokenizer.load(config.tokenizer)
    else:
        raise ConfigError(f"tokenizer={config.tokenizer!r}; allowed are bpe:SIZE, bytes, or a checkpoint's folder")
    tokenizer.save(cache / "tokenizer")
    return tokenizer


def _sample(corpus: Corpus) -> Any:
    """The beginning of the training text: more of it teaches a tokenizer little and costs minutes."""
    left = _TOKENIZER_SAMPLE_BYTES
    for text in corpus.part("train"):
        yield text
        left -= len(text)
        if left <= 0:
            return


def build_model(config: TrainConfig, data: Data) -> LoopedLM:
    """The model that step 1 finds: new, or read from `init`.

    Raises:
        ConfigError: when the stages do not suit the model.
    """
    if config.init is not None:
        model = load(config.init, dtype="float32", device=config.device)
        if data.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"{config.init} has {model.config.vocab_size} token ids and its tokenizer makes up to "
                f"{data.vocab_size}; the two do not belong together"
            )
    else:
        if config.model is None:
            raise ConfigError("give either model=... (a new model) or init=PATH_OR_ID (one to start from)")
        model = LoopedLM(replace(config.model, vocab_size=data.vocab_size))
        initialise(model, seed=config.seed)
        model = model.to(config.device)
        model.tokenizer = data.tokenizer
        model.origin = Origin(family=config.family, config=_special_ids(data.tokenizer))
    for stage in config.stages:
        objective = build_objective(stage.objective)
        if objective.needs_hazards and model.gate is None:
            raise ConfigError(
                f"stage {stage.name}: objective {objective.name} needs an exit gate and this model has none; "
                "choose last, every or random-depth"
            )
        if stage.context > model.config.max_positions:
            raise ConfigError(
                f"stage {stage.name}: context={stage.context}; this model holds {model.config.max_positions}"
            )
    if config.compile:
        model.compile_core()
    return model.train()


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None}


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON."""
    return to_dict(config)
