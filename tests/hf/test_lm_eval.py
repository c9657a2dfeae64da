"""lm-eval on an offline task: every loop's scores from one pass, compared with direct computation."""

import math
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import loopwise
from loopwise.engine.reference import generate
from loopwise.errors import ConfigError, InputError
from loopwise.hf import wrap
from loopwise.hf.lm_eval import LoopedEvalModel, evaluate_loops
from loopwise.hub.tokenizer import Tokenizer
from loopwise.models.looped_lm import LoopedLM, initialise

HERE = Path(__file__).parent
LOOPS = (1, 2, 4)
QUIET = {"bootstrap_iters": 0, "log_samples": True}


def byte_model(*, context: int = 256) -> LoopedLM:
    model = LoopedLM(
        loopwise.LoopedLMConfig(
            vocab_size=257,
            width=16,
            heads=2,
            kv_heads=2,
            head_width=8,
            mlp_width=24,
            core_layers=1,
            coda_layers=1,
            loops=4,
            trained_loops=(1, 4),
            max_positions=context,
            gate=True,
        )
    ).double()
    initialise(model, seed=4)
    # Fresh weights hardly tell loops apart.
    with torch.no_grad():
        for parameter in model.core.parameters():
            parameter.mul_(3.0)
    model.tokenizer = Tokenizer.bytes()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LoopedLM:
    return byte_model()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    shutil.copytree(HERE / "tasks", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    # It asks the machine for seconds what is installed on it.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def score(model: LoopedLM, context: str, continuation: str, loop: int) -> float:
    """One continuation at one loop, alone."""
    before, after = list(context.encode()), list(continuation.encode())
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]]), loops=loop).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    return sum(float(logprobs[len(before) + i - 1, token]) for i, token in enumerate(after))


def test_multiple_choice_at_every_loop_from_one_pass(
    model: LoopedLM, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    encodings = []
    encode = LoopedLM.encode
    monkeypatch.setattr(
        LoopedLM,
        "encode",
        lambda self, inputs, **options: (encodings.append(len(inputs)), encode(self, inputs, **options))[1],
    )
    results = evaluate_loops(wrap(model), ["looped_choice"], loops=LOOPS, batch_size=4, task_manager=manager, **QUIET)
    assert encodings == [4, 4, 4, 2]
    assert tuple(results) == LOOPS
    answers = set()
    for loop, result in results.items():
        samples = result["samples"]["looped_choice"]
        right = []
        for sample in samples:
            doc = sample["doc"]
            direct = [score(model, doc["question"], f" {choice}", loop) for choice in doc["choices"]]
            given = [response[0][0] for response in sample["resps"]]
            assert given == pytest.approx(direct, abs=1e-9)
            right.append(direct.index(max(direct)) == doc["answer"])
            answers.add((loop, *given))
        assert result["results"]["looped_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
        assert result["config"]["num_loops"] == loop
    assert len(answers) == len(LOOPS) * 5


def test_perplexity_over_windows_and_answers_in_text(model: LoopedLM, manager: TaskManager) -> None:
    short = byte_model(context=16)
    results = evaluate_loops(short, ["looped_text", "looped_answer"], loops=(1, 4), task_manager=manager, **QUIET)
    for loop, result in results.items():
        total, size = 0.0, 0
        for sample in result["samples"]["looped_text"]:
            ids = list(sample["target"].encode())
            size += len(ids)
            # The first window has the text's beginning behind a bos, later ones the one token before them or more.
            sequence = [256, *ids]
            for first in range(0, len(ids), 16):
                last = min(first + 16, len(ids))
                begin = max(0, last - 16) if first else 0
                with torch.no_grad():
                    logits = short(torch.tensor([sequence[begin:last]]), loops=loop).logits[0]
                logprobs = torch.log_softmax(logits, dim=-1)
                total += sum(float(logprobs[i - begin, sequence[i + 1]]) for i in range(first, last))
        found = result["results"]["looped_text"]["byte_perplexity,none"]
        assert found == pytest.approx(math.exp(-total / size), rel=1e-9)
        for sample in result["samples"]["looped_answer"]:
            prompt = list(sample["doc"]["question"].encode())[-11:]
            done = generate(short, [prompt], loopwise.Sampling(max_tokens=5, max_loops=loop, stop=("\n",)))[0]
            assert sample["resps"] == [[done.text]]


def request(*arguments: Any) -> Instance:
    return Instance("loglikelihood", {}, arguments, 0)


def test_one_object_serves_simple_evaluate_and_its_dials(model: LoopedLM, tmp_path: Path) -> None:
    wrapped = LoopedEvalModel(model, loops=LOOPS)
    assert wrapped.report == 4
    assert isinstance(wrapped, lm_eval.api.model.LM)
    pairs = [request("ab", "cd"), request("", "cd"), request("ab ", "cd")]
    deep = wrapped.loglikelihood(pairs, disable_tqdm=True)
    shallow = wrapped.at(1).loglikelihood(pairs, disable_tqdm=True)
    assert wrapped.passes == 1
    for found, loop in ((deep, 4), (shallow, 1)):
        assert found[0][0] == pytest.approx(score(model, "ab", "cd", loop), abs=1e-9)
        assert found[2][0] == pytest.approx(score(model, "ab", " cd", loop), abs=1e-9)
    likeliest = model(torch.tensor([list(b"ab")]), loops=1).logits[0, -1].argmax()
    assert wrapped.at(1).score([(b"ab", [int(likeliest)])])[0].greedy[0]
    assert not wrapped.at(1).score([(b"ab", [(int(likeliest) + 1) % 256])])[0].greedy[0]

    options = {"max_gen_toks": 4, "until": ["zzz"]}
    sampled = {"do_sample": True, "temperature": 2.0, "seed": 5}
    for given, sampling in (
        ({}, loopwise.Sampling(max_tokens=4, max_loops=4)),
        ({"num_loops": 2}, loopwise.Sampling(max_tokens=4, max_loops=2)),
        ({"exit": "hazard:0.5"}, loopwise.Sampling(max_tokens=4, max_loops=4, exit="hazard:0.5")),
        (sampled, loopwise.Sampling(max_tokens=4, max_loops=4, temperature=2.0, seed=5)),
    ):
        text = wrapped.generate_until([request("ab", options | given)])
        assert text == [generate(model, ["ab"], sampling)[0].text]

    loopwise.save(model, tmp_path)
    again = LoopedEvalModel(tmp_path, loops=(1,), add_bos=True)
    assert again.tok_encode("ab") == [256, 97, 98]
    assert again.tok_encode("ab", add_special_tokens=False) == [97, 98]


def test_what_would_mislead_is_refused(model: LoopedLM) -> None:
    wrapped = LoopedEvalModel(model, loops=(1, 2))
    for call, message in (
        (lambda: wrapped.at(4), "loop 4 is not read; allowed are 1, 2"),
        (lambda: LoopedEvalModel(model, loops=()), "give one loop or more"),
        (lambda: LoopedEvalModel(object()), "object is no looped model"),
        (lambda: wrapped.generate_until([request("a", {"num_beams": 3})]), "num_beams: allowed are until"),
        (lambda: evaluate_loops(model, ["x"], loops=(1,), use_cache="file"), "does not take use_cache"),
        (lambda: wrapped.apply_chat_template([{"role": "user", "content": "a"}]), "chat=True"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(InputError, match="a continuation of 0"):
        wrapped.score([([1], [])])


def test_chat_prompts_keep_their_special_tokens(model: LoopedLM) -> None:
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    wrapped = LoopedEvalModel(model, loops=(1,), tokenizer=tokenizer, chat=True)
    prompt = wrapped.apply_chat_template([{"role": "user", "content": "ab"}])
    assert prompt == "<|endoftext|>ab"
    assert wrapped.tok_encode(prompt) == [256, 97, 98]
    assert model.tokenizer is not tokenizer
