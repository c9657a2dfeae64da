"""Small language models on real text: a corpus as packed rows of tokens, and training on it."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from _lab import RUNS
from torch import Tensor

from loopwise.hub.tokenizer import Tokenizer
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.objectives.base import Objective
from loopwise.tasks.corpus import Corpus
from loopwise.train.batches import Batch
from loopwise.train.fit import FitConfig, fit
from loopwise.train.sources import PackedSource
from loopwise.train.step import micro_batch_loss, training_start


@dataclass(frozen=True, kw_only=True)
class Text:
    """What to read, and how much of it at a time."""

    corpus: str = "python"
    """A corpus as `loopwise train` takes it."""
    corpus_bytes: int
    """Bytes of it that are read; a twentieth is held out."""
    vocabulary: int
    """Tokens of a byte-level BPE made of the training part."""
    context: int
    """Tokens of a row."""
    rows: int
    """Rows of a step."""

    def read(self) -> Corpus:
        return Corpus(self.corpus, limit=self.corpus_bytes)

    def tokenizer(self) -> Tokenizer:
        """Made once, and found again by the text it was made of."""
        corpus = self.read()
        folder = RUNS / "text" / f"bpe-{self.vocabulary}-{corpus.summary.digest[:16]}"
        if not folder.is_dir():
            aside = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
            Tokenizer.train(corpus.part("train"), self.vocabulary).save(aside)
            if folder.is_dir():
                shutil.rmtree(aside)
            else:
                aside.replace(folder)
        return Tokenizer.load(folder)

    def source(self, seed: int) -> PackedSource:
        """Rows in an order that the seed decides; the held-out ones are the same for all seeds."""
        return PackedSource.open(self.read(), self.tokenizer(), RUNS / "text", length=self.context, seed=seed)


def train_on_text(
    config: LoopedLMConfig,
    text: Text,
    objective: Objective,
    fit_config: FitConfig,
    *,
    seed: int,
    device: str,
    checkpoints: Path,
    log: Callable[[int, Mapping[str, float]], None],
) -> LoopedLM:
    """A new model, trained on the CPU or elsewhere and returned on the CPU.

    Args:
        seed: of the weights, of the order of rows, and of what the objective draws.
        checkpoints, log: see `fit`.
    """
    source = text.source(seed)
    model = LoopedLM(config)
    initialise(model, seed=seed)
    model.to(device)

    def batches(step: int) -> Batch:
        return source.batch(step, 0, rows=text.rows).to(device)

    def loss(batch: Batch, step: int) -> Tensor:
        plan = objective.plan(seed=seed, step=step, micro=0)
        start = training_start(model, batch, seed=seed, step=step, micro=0)
        progress = step / fit_config.steps
        return micro_batch_loss(model, batch, objective, plan, progress=progress, start=start).loss.total

    fit(model, loss, batches, fit_config, checkpoints=checkpoints, log=log)
    return model.to("cpu")
