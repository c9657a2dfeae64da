"""From a configuration to the data and the model that a run begins with."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loopwise.errors import ConfigError, InputError
from loopwise.hub.checkpoints import FAMILIES, inspect, load
from loopwise.hub.family import Origin
from loopwise.hub.tokenizer import Tokenizer
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.nn.noise import integer
from loopwise.tasks.corpus import Corpus
from loopwise.tasks.pointer_chasing import PointerChasing
from loopwise.train.batches import BatchSource
from loopwise.train.config import DEFAULT_TOKENIZER, UNKNOWN_VOCABULARY, TrainConfig, check_fit, with_trained_loops
from loopwise.train.sources import PackedSource, PointerChasingSource
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
        here = config.stages[stage]
        if self.train is None or here.context is None:
            seed = integer(config.seed, f"stage {stage}")
            return PointerChasingSource(PointerChasing(config.pointer_chasing), seed=seed)
        read = sum(s.steps * s.micro_batches * s.rows * (s.context or 0) for s in config.stages[:stage])
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
        """Bytes of held-out text behind each token whose loss counts; None for tasks."""
        return None if self.validation is None else self.validation.bytes_per_token

    def identity(self) -> list[dict[str, Any]]:
        """What decides every batch of the run, as JSON."""
        return [self.source(stage).state() for stage in range(len(self.config.stages))]


def build_data(config: TrainConfig, *, cache: Path) -> Data:
    """Read and pack the corpus, or set up the task.

    Raises:
        UserError: for a missing, empty or broken corpus or checkpoint, or a tokenizer that does not exist.
    """
    held: Tokenizer | None = None
    if config.init is not None:
        found = inspect(config.init)
        check_fit(config, found.config)
        held = found.tokenizer
    if config.task == "pointer-chasing":
        return Data(config=config, vocab_size=PointerChasing(config.pointer_chasing).vocab_size)
    if config.init is not None and held is None:
        raise ConfigError(f"{config.init} has no tokenizer.json, so text cannot be read for it; put one beside it")
    corpus = Corpus(config.corpus, limit=config.corpus_bytes)
    tokenizer = held or _tokenizer(config.tokenizer or DEFAULT_TOKENIZER, corpus, cache)
    data = Data(
        config=config,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        train=token_store(corpus, tokenizer, cache, part="train"),
        validation=token_store(corpus, tokenizer, cache, part="validation"),
    )
    for stage in config.stages:
        if stage.context is not None and data.train is not None and data.train.facts.tokens <= stage.context:
            raise InputError(
                f"stage {stage.name}: the corpus makes {data.train.facts.tokens} tokens, too few for one row of "
                f"context={stage.context} and its last target; give a shorter context, or more text"
            )
    return data


def _tokenizer(spec: str, corpus: Corpus, cache: Path) -> Tokenizer:
    kind, _, size = spec.partition(":")
    if spec == "bytes":
        return Tokenizer.bytes()
    if kind == "bpe" and size.isdigit():
        return _trained_tokenizer(int(size), corpus, cache)
    if Path(spec).is_dir():
        return Tokenizer.load(spec)
    raise ConfigError(f"tokenizer={spec!r}; allowed are bpe:SIZE, bytes, or a checkpoint's folder")


def _trained_tokenizer(size: int, corpus: Corpus, cache: Path) -> Tokenizer:
    """Found again by what it was made from, so that another corpus never gets this one's tokenizer."""
    identity = json.dumps([size, corpus.summary.digest])
    folder = cache / f"tokenizer-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    if not folder.is_dir():
        aside = folder.with_name(f".writing-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        Tokenizer.train(_sample(corpus), size).save(aside)
        aside.replace(folder)
    return Tokenizer.load(folder)


def _sample(corpus: Corpus) -> Iterator[str]:
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
        ConfigError: the model has fewer token ids than the data, or there is no such device.
        UserError: for a missing or broken checkpoint.
    """
    device = check_device(config.device)
    if config.model is None:
        model = load(config.init or "", dtype="float32", device=device)
    else:
        asked = config.model.vocab_size
        model = LoopedLM(replace(config.model, vocab_size=data.vocab_size if asked == UNKNOWN_VOCABULARY else asked))
        initialise(model, seed=config.seed)
        model = model.to(device)
        model.tokenizer = data.tokenizer
        model.origin = Origin(family=config.family or "loopwise", config=_special_ids(data.tokenizer))
        # A family that cannot hold this shape should say so now and not when the training is done.
        FAMILIES[model.origin.family].write_config(model.config, model.origin.config)
    if data.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the model has {model.config.vocab_size} token ids and the data makes up to {data.vocab_size}; "
            "the two do not belong together"
        )
    model.config = with_trained_loops(model.config, config.stages)
    model.facts = replace(model.facts, trained_loops=model.config.trained_loops, anytime=model.config.anytime)
    if config.compile:
        model.compile_core()
    return model.train()


def check_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: allowed are cpu, cuda, cuda:1, mps") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        raise ConfigError(f"device={name}: there is no such device here; type: device=cpu")
    return device


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None}
