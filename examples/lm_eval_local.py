"""Score a looped model on a task of one's own, at every loop from one pass, without a network.

    python examples/lm_eval_local.py                       # a tiny fresh model and four questions: chance level
    python examples/lm_eval_local.py MODEL 1,2,4 TASK_FOLDER TASK

A task is a YAML file and its data; the harness's own tasks work the same way (leave TASK_FOLDER out).
"""

import json
import sys
import tempfile
from pathlib import Path

from lm_eval.tasks import TaskManager

import loopwise
from loopwise.hf.lm_eval import evaluate_loops

QUESTIONS = [
    {"question": "Two and two is", "choices": ["seven", "four", "a hundred"], "answer": 1},
    {"question": "The opposite of cold is", "choices": ["hot", "table"], "answer": 0},
    {"question": "After Monday comes", "choices": ["Tuesday", "Sunday", "May"], "answer": 0},
    {"question": "A looped model applies its core", "choices": ["never", "again and again"], "answer": 1},
]
TASK = """\
task: four_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def write_task(folder: Path) -> None:
    """A task of four questions: JSON lines, and the YAML that says how to ask them."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "four_questions.yaml").write_text(TASK.format(data=data, cache=folder / "cache"))


def tiny_model() -> loopwise.LoopedLM:
    """A fresh model that reads bytes, for trying the script out."""
    from loopwise.models.looped_lm import initialise

    config = loopwise.LoopedLMConfig(
        vocab_size=257, width=32, heads=2, kv_heads=2, head_width=16, mlp_width=64, core_layers=1, loops=4,
        trained_loops=(1, 4), max_positions=256,
    )  # fmt: skip
    model = loopwise.LoopedLM(config)
    initialise(model, seed=0)
    model.tokenizer = loopwise.Tokenizer.bytes()
    return model


def main(model: object, loops: tuple[int, ...], tasks: Path | None, task: str) -> None:
    """Evaluate and print one line per loop."""
    manager = TaskManager(include_path=None if tasks is None else str(tasks), include_defaults=tasks is None)
    results = evaluate_loops(model, [task], loops=loops, task_manager=manager, bootstrap_iters=0)
    for loop, result in results.items():
        figures = {name: value for name, value in result["results"][task].items() if isinstance(value, float)}
        print(f"loop {loop}: " + "   ".join(f"{name.split(',')[0]} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as name:
            write_task(Path(name))
            main(tiny_model(), (1, 2, 4), Path(name), "four_questions")
    else:
        source, counts, *rest = sys.argv[1:]
        where = Path(rest[0]) if len(rest) == 2 else None
        main(source, tuple(int(count) for count in counts.split(",")), where, rest[-1])
