"""transformers' Trainer on looped models: three steps, gradient accumulation, and resuming from its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import loopwise
from loopwise.hf import LoopedForCausalLM, ObjectiveProgress

GOLDEN = Path(__file__).parents[1] / "golden"


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, 320, (count, 7), generator=generator)
    labels = drawn.clone()
    labels[:, 0] = -100
    # Rows of a batch differ in what they ask, so that averaging them evenly would be wrong.
    labels[::2, :4] = -100
    return [{"input_ids": ids, "labels": wanted} for ids, wanted in zip(drawn, labels, strict=True)]


def train(model: LoopedForCausalLM, folder: Path, *, steps: int = 3, resume: bool = False, **options: Any) -> Trainer:
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **(defaults | options),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(12), eval_dataset=rows(4))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("family", ["ouro-tiny", "huginn-tiny"])
def test_three_steps_learn_and_the_result_is_a_family_checkpoint(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / family, num_loops=2)
    trainer = train(model, tmp_path)
    assert trainer.state.global_step == 3
    before = AutoModelForCausalLM.from_pretrained(GOLDEN / family, num_loops=2)
    batch = {name: torch.stack([row[name] for row in rows(12)]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert model.eval()(**batch).loss < before(**batch).loss - 0.05
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model(str(tmp_path / "final"))
    again = loopwise.load(tmp_path / "final")
    with torch.no_grad():
        assert torch.equal(again(batch["input_ids"]).logits, model(batch["input_ids"]).logits)


def test_accumulated_steps_weigh_every_label_the_same(tmp_path: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(GOLDEN / "ouro-tiny", dtype="float64") for _ in range(2)]
    plain = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "steps": 1,
        "learning_rate": 0.1,
        "train_sampling_strategy": "sequential",
    }
    train(models[0], tmp_path, per_device_train_batch_size=4, **plain)
    train(models[1], tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **plain)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


def test_resuming_continues_to_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_pretrained(GOLDEN / "huginn-tiny", num_loops=2)
    train(whole, tmp_path, steps=4, save_strategy="steps", save_steps=2)
    (tmp_path / "checkpoint-4").rename(tmp_path / "set-aside")
    resumed = AutoModelForCausalLM.from_pretrained(GOLDEN / "huginn-tiny", num_loops=2)
    train(resumed, tmp_path, steps=4, save_strategy="steps", save_steps=2, resume=True)
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_the_callback_tells_the_model_how_far_training_is(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "ouro-tiny", objective="expected:loops=2,uniform_until=0.5")
    seen: list[float | None] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(kwargs["model"].progress)

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=rows(4), callbacks=[ObjectiveProgress(), Watch()]).train()
    assert seen == [0.0, 0.25, 0.5, 0.75]
