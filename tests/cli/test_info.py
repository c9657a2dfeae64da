"""`loopwise info`: the published numbers from config.json alone, and whether weights are there and whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loopwise.cli import main
from loopwise.cli.info import flop, loop_counts, short, size
from loopwise.hub.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
OURO_1_4B: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 49152,
    "max_position_embeddings": 65536,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
HUGINN: dict[str, Any] = {
    "model_type": "huginn_raven",
    "n_embd": 5280,
    "n_heads": 55,
    "block_size": 4096,
    "vocab_size": 65536,
    "intermediate_size": 17920,
    "norm_eps": 1e-6,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "mean_recurrence": 32,
    "qk_bias": True,
    "tie_embeddings": True,
    "rope_base": 50_000,
    "torch_dtype": "bfloat16",
}


def facts(config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["info", str(folder), "--json", *words]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(("layers", "parameters", "kv"), [(24, 1_434_652_673, 786_432), (48, 2_667_974_657, 1_572_864)])
def test_ouro_from_its_config_alone(
    layers: int, parameters: int, kv: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = facts(OURO_1_4B | {"num_hidden_layers": layers}, tmp_path, capsys, "--context", "0")
    assert said["parameters"]["stored"] == parameters
    assert said["parameters"]["unrolled"]["4"] == parameters + 3 * layers * 51_388_416
    assert said["kv_bytes_per_token"] == {
        "per_loop": kv,
        "last_exited_by_mean_loops": {str(loops): kv * loops // 4 for loops in (1, 2, 3, 4)},
        "single": kv // 4,
    }
    flops = said["flops_per_token"]
    assert flops["fixed"] == 2 * 49152 * 2048
    assert flops["by_loops"]["4"] == flops["fixed"] + 4 * flops["per_loop"]
    assert said["weights"]["state"] == "absent"
    assert said["tokenizer"]["special"] == {"bos": 1, "eos": [2, 0], "pad": 0}
    assert said["loops"]["signal"] == "hazard"


def test_huginn_from_its_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = facts(HUGINN, tmp_path, capsys)
    assert said["parameters"]["stored"] == 3_564_976_800
    assert said["kv_bytes_per_token"]["per_loop"] == 132 * 21_120
    assert said["kv_bytes_per_token"]["single"] == 8 * 21_120
    assert list(said["flops_per_token"]["by_loops"]) == ["1", "2", "4", "8", "16", "32"]
    assert said["flops_per_token"]["context"] == 2048
    assert said["loops"] == {
        "default": 32,
        "trained": [1, 64],
        "unit": "token",
        "signal": None,
        "anytime": True,
        "start": "normal",
        "injection": "adapter",
    }


def page(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info", str(folder)]) == 0
    return capsys.readouterr().out


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OURO_1_4B))
    text = page(tmp_path, capsys, monkeypatch)
    for words in (
        "1,434,652,673 stored",
        "5.13 B unrolled",
        "786,432 bytes",
        "one shared plane 192 KiB",
        "not here",
        "bos 1; eos 2, 0; pad 0",
        "by a learned gate",
        "4, trained at 1 to 4",
    ):
        assert words in text
    rows = [line.split() for line in text.splitlines()]
    assert ["4", "5.13", "B", "11.7", "G", "100%", "768", "KiB"] in rows


def test_whole_weights_and_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "huginn-tiny" / name, tmp_path / name)
    Tokenizer.bytes().save(tmp_path)
    text = page(tmp_path, capsys, monkeypatch)
    for words in ("whole: 50 tensors, float32, 1.11 MiB in 1 file", "257 tokens", "eos 256 <|endoftext|>"):
        assert words in text


def test_broken_weights_are_told_and_the_rest_is_still_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(GOLDEN / "ouro-tiny" / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "ouro-tiny" / "model.safetensors").read_bytes()[:-9])
    text = page(tmp_path, capsys, monkeypatch)
    assert "broken: " in text
    assert "192,385 stored" in text
    assert main(["info", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["weights"]["state"] == "broken"
    assert "truncated" in said["weights"]["problem"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, "error: config.json: model_type='gpt2'; supported are ouro, huginn_raven, loopwise"),
        (OURO_1_4B | {"hidden_size": None}, "error: config.json: hidden_size=None; a whole number is needed"),
    ],
)
def test_one_line_for_what_cannot_be_read(
    config: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["info", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(words)
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "ctm-parity-tiny",
            (
                "18,395 (start_history 1%",
                "48, each with a network of its own (4 hidden) over its last 5",
                "random: 36 pairs for the answer, 21 for attention",
                "one of 2 classes at each of 16 places",
                "trained at 1 to 10",
                "certainty:0.9",
                "whole: 33 tensors, float32",
            ),
        ),
        (
            "trm-attention-tiny",
            (
                "2 layers for latent and answer alike",
                "3 times: 4 updates of the latent",
                "5 kinds of puzzle",
                "halt:0.0",
            ),
        ),
    ],
)
def test_what_is_no_language_model(
    name: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(GOLDEN / name, capsys, monkeypatch)
    for word in words:
        assert word in text


def test_what_is_no_language_model_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(GOLDEN / "trm-mlp-tiny"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    parts = said["parameters"]
    assert sum(count for part, count in parts.items() if part != "stored") == parts["stored"]
    assert (said["family"], said["dtype"], said["weights"]["state"]) == ("trm", "float32", "whole")
    assert said["loops"] == {"trained": [1, 4], "unit": "sample", "signal": "halt_logit", "anytime": True}
    assert said["config"]["mixing"] == "mlp"
    assert main(["info", str(GOLDEN / "trm-mlp-tiny"), "--context", "4"]) == 2
    assert capsys.readouterr().err == "error: --context=4 has no effect on a TRM; leave it out\n"


@pytest.mark.parametrize("command", [["generate", "{}", "hello"], ["serve", "{}"]])
def test_who_writes_text_refuses_it_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(GOLDEN / "ctm-parity-tiny") for word in command]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: config.json is of a CTM, and only a language model will do here; ")
    assert said.err.count("\n") == 1


def test_usage_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(OURO_1_4B))
    assert main(["info", str(tmp_path), "--context=-1"]) == 2
    assert "--context=-1: allowed is 0 or more" in capsys.readouterr().err


def test_figures() -> None:
    assert [short(number) for number in (7, 999, 1_434_652_673, 3_901_296_641, 5.1e12)] == [
        "7.00",
        "999",
        "1.43 B",
        "3.90 B",
        "5.10 T",
    ]
    assert flop(3.07e9) == "3.07 G"
    assert [size(number) for number in (500, 786_432, 2.9e9)] == ["500 bytes", "768 KiB", "2.70 GiB"]
    assert loop_counts(8) == list(range(1, 9))
    assert loop_counts(12) == [1, 2, 4, 8, 12]
    assert loop_counts(1) == [1]
