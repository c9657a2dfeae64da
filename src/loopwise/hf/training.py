"""What transformers' `Trainer` needs to know of objectives that change while training goes on."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ObjectiveProgress(TrainerCallback):
    """Tells the model how far training is: `model.progress` runs from 0 to 1 over the trainer's steps."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        # An adapter's wrapper holds our model inside.
        target = model.get_base_model() if hasattr(model, "get_base_model") else model
        target.progress = state.global_step / max(state.max_steps, 1)
