"""Teach a looped model with LoRA on its core, merge the adapter, and save a checkpoint of the same family.

    python examples/finetune_lora.py                                   # a tiny fresh model and Python's own manual
    python examples/finetune_lora.py MODEL out steps=200 text=notes.txt

The adapter sits on the matrices of the core, so all loops share it and its gradient is the sum over the loops.
"""

import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import loopwise
import loopwise.hf

ROW = 64


def tiny_model() -> loopwise.LoopedLM:
    """A fresh model of a few thousand parameters that reads bytes, for trying the script out."""
    from loopwise.models.looped_lm import initialise

    config = loopwise.LoopedLMConfig(
        vocab_size=257, width=64, heads=4, kv_heads=4, head_width=16, mlp_width=128, core_layers=2, loops=4,
        trained_loops=(1, 4), max_positions=256, norm="pre_branch", loop_norm=True, final_norm=False, gate=True,
    )  # fmt: skip
    model = loopwise.LoopedLM(config)
    initialise(model, seed=0)
    model.tokenizer = loopwise.Tokenizer.bytes()
    return model


def rows(ids: list[int]) -> list[dict[str, torch.Tensor]]:
    """Rows of equal length; `labels` are the tokens themselves, the model shifts them."""
    pieces = torch.tensor(ids[: len(ids) // ROW * ROW]).view(-1, ROW)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


@torch.no_grad()
def losses(model: Any, batch: torch.Tensor, loops: tuple[int, ...]) -> str:
    """The loss after each of several loop counts, in nats per token."""
    shown = []
    for count in loops:
        logits = model(input_ids=batch, num_loops=count).logits[:, :-1]
        shown.append(f"{count}: {torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()):.3f}")
    return "   ".join(shown)


def main(source: str | None, target: Path, *, steps: int = 60, text: str | None = None) -> None:
    """Train, compare, merge, save."""
    if source is None:
        source = tempfile.mkdtemp()
        loopwise.save(tiny_model(), source)
    model = AutoModelForCausalLM.from_pretrained(source)
    # What labels mean. Ouro's stage I is the default where there is an exit gate; "last" leaves the gate alone.
    model.objective = "last"
    tokenizer = model.model.tokenizer
    data = rows(tokenizer.encode(Path(text).read_text() if text else "\n".join(topics.values())[:200_000]))
    held_out, data = torch.stack([row["input_ids"] for row in data[-16:]]), data[:-16]
    counts = tuple(sorted({1, 2, model.config.num_loops}))

    adapted = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=loopwise.hf.CORE_LINEAR, task_type="CAUSAL_LM")
    )
    adapted.print_trainable_parameters()
    held_out = held_out.to(adapted.device)
    print(f"loss by loops, before: {losses(adapted, held_out, counts)}")
    arguments = TrainingArguments(
        output_dir=str(target / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=max(1, steps // 4),
        save_strategy="no",
    )
    Trainer(adapted, arguments, train_dataset=data).train()
    adapted.eval()
    held_out = held_out.to(adapted.device)
    print(f"loss by loops, after:  {losses(adapted, held_out, counts)}")

    with torch.no_grad():
        before = adapted(input_ids=held_out).logits.cpu()
        adapted.merge_and_unload().save_pretrained(target / "merged")
        merged = loopwise.load(target / "merged")
        difference = (merged(held_out.cpu()).logits - before).abs().max()
    print(f"merged and saved to {target / 'merged'}; largest difference in a logit {difference:.1e}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if "=" not in word]
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    main(
        words[0] if words else None,
        Path(words[1]) if len(words) > 1 else Path(tempfile.mkdtemp()),
        steps=int(given.get("steps", 60)),
        text=given.get("text"),
    )
