"""Loading checks every name and shape; saving writes the family's own names back, bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loopwise
from loopwise.errors import CheckpointError, CheckpointWarning, ConfigError
from loopwise.hub.checkpoints import inspect, load, save
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.nn.rotary import RotaryScaling

TIED_OURO = {"tie_word_embeddings": True}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def own(**changes: Any) -> LoopedLM:
    config = LoopedLMConfig(
        **{
            "vocab_size": 31,
            "width": 16,
            "heads": 4,
            "kv_heads": 2,
            "head_width": 4,
            "mlp_width": 24,
            "prelude_layers": 1,
            "core_layers": 2,
            "coda_layers": 1,
            "loops": 3,
            "trained_loops": (1, 3),
            "max_positions": 32,
        }
        | changes
    )
    model = LoopedLM(config).eval()
    initialise(model, seed=1)
    return model


@pytest.mark.parametrize("name", ["ouro-tiny", "huginn-tiny"])
@pytest.mark.parametrize("shard_bytes", [10**9, 150_000])
def test_round_trip_is_bit_for_bit(name: str, shard_bytes: int, golden: Path, tmp_path: Path) -> None:
    save(load(golden / name), tmp_path / "again", shard_bytes=shard_bytes)
    assert same(stored(tmp_path / "again"), load_file(golden / name / "model.safetensors"))
    again, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", golden / name)
    )
    assert again == original
    assert list(again) == list(original)
    sharded = (tmp_path / "again" / "model.safetensors.index.json").is_file()
    assert sharded == (shard_bytes < 10**9)
    if sharded:
        assert max(file.stat().st_size for file in (tmp_path / "again").glob("*.safetensors")) < 170_000
        save(load(tmp_path / "again"), tmp_path / "whole")
        assert same(stored(tmp_path / "whole"), stored(tmp_path / "again"))


def test_sharding_differently_leaves_no_old_files(golden: Path, tmp_path: Path) -> None:
    model = load(golden / "ouro-tiny")
    for shard_bytes in (100_000, 300_000, 10**9, 100_000):
        save(model, tmp_path, shard_bytes=shard_bytes)
        assert same(stored(tmp_path), load_file(golden / "ouro-tiny" / "model.safetensors"))
        assert not list(tmp_path.glob("*.tmp"))


def test_saved_files_may_be_read_by_whoever_may_read_others(golden: Path, tmp_path: Path) -> None:
    save(load(golden / "ouro-tiny"), tmp_path)
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


NATIVE: list[dict[str, Any]] = [
    {},
    {"norm": "pre_branch", "loop_norm": True, "gate": True, "tied_head": True},
    {"norm": "post", "start": "zeros", "injection": "add", "qk_norm": True},
    {"start": "normal", "injection": "adapter", "adapter_bias": True, "qk_bias": True, "rotary": "interleaved"},
    {"rotary_scaling": RotaryScaling(factor=8.0, original_positions=16), "anytime": True, "trained_loops": (2, 9)},
]


@pytest.mark.parametrize("changes", NATIVE, ids=lambda changes: ",".join(changes) or "plain")
def test_every_shape_keeps_its_own_format(changes: dict[str, Any], tmp_path: Path) -> None:
    model = own(**changes)
    loopwise.save(model, tmp_path)
    loaded = loopwise.load(tmp_path)
    assert loaded.config == model.config
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens, start="zero").logits, model(tokens, start="zero").logits)
    assert inspect(tmp_path).weights is not None


@pytest.mark.parametrize("name", ["ouro-tiny", "huginn-tiny"])
def test_into_our_format_and_back(name: str, golden: Path, tmp_path: Path) -> None:
    save(load(golden / name), tmp_path / "ours", family="loopwise")
    ours = load(tmp_path / "ours")
    assert ours.origin is not None
    assert ours.origin.family == "loopwise"
    family = json.loads((golden / name / "config.json").read_text())["model_type"]
    save(ours, tmp_path / "back", family=family)
    back = load(tmp_path / "back")
    assert back.config == load(golden / name).config
    kept = stored(tmp_path / "back")
    original = load_file(golden / name / "model.safetensors")
    # What the model computes itself or ties is not stored twice in a checkpoint that was written anew.
    assert original.keys() - kept.keys() <= {"freqs_cis", "lm_head.weight"}
    assert all(torch.equal(kept[key], original[key]) for key in kept)


def test_a_family_refuses_shapes_it_cannot_hold(tmp_path: Path) -> None:
    for family in ("ouro", "huginn_raven"):
        with pytest.raises(ConfigError, match="type: family=loopwise"):
            save(own(), tmp_path / family, family=family)
        assert not (tmp_path / family).exists()
    with pytest.raises(ConfigError, match="allowed are ouro, huginn_raven, loopwise"):
        save(own(), tmp_path, family="llama")
    with pytest.raises(ConfigError, match="allowed are float64, float32, bfloat16, float16"):
        save(own(), tmp_path, dtype="int8")


def test_dtypes(golden: Path, tmp_path: Path) -> None:
    assert load(golden / "ouro-tiny").embed.weight.dtype == torch.float32
    assert load(golden / "ouro-tiny", dtype="bfloat16").embed.weight.dtype == torch.bfloat16
    assert load(golden / "ouro-tiny", dtype=torch.float64).embed.weight.dtype == torch.float64
    with pytest.raises(ConfigError, match="allowed are float64, float32, bfloat16, float16"):
        load(golden / "ouro-tiny", dtype="fp8")
    save(load(golden / "ouro-tiny"), tmp_path, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in stored(tmp_path).values()} == {torch.bfloat16}
    assert load(tmp_path).embed.weight.dtype == torch.bfloat16


def test_a_huginn_table_stays_float32_when_the_weights_change(golden: Path, tmp_path: Path) -> None:
    save(load(golden / "huginn-tiny"), tmp_path, dtype="bfloat16")
    tensors = stored(tmp_path)
    assert tensors["freqs_cis"].dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    load(tmp_path)


def test_mixed_dtypes_warn(copy: Any) -> None:
    folder = copy("ouro-tiny")
    tensors = folder.tensors()
    tensors["model.early_exit_gate.weight"] = tensors["model.early_exit_gate.weight"].bfloat16()
    folder.store(tensors)
    with pytest.warns(CheckpointWarning, match=r"mixes bfloat16, float32; everything is loaded as float32"):
        load(folder.path)
    load(folder.path, dtype="float32")


TABLE = "transformer.wte.weight"


@pytest.mark.parametrize("kept", [(TABLE,), ("lm_head.weight",), (TABLE, "lm_head.weight")])
def test_tied_spellings_of_huginn(kept: tuple[str, ...], copy: Any, golden: Path, tmp_path: Path) -> None:
    folder = copy("huginn-tiny")
    tensors = folder.tensors()
    table = tensors.pop(TABLE)
    del tensors["lm_head.weight"]
    folder.store(tensors | dict.fromkeys(kept, table))
    model = load(folder.path)
    assert torch.equal(model.embed.weight, load(golden / "huginn-tiny").embed.weight)
    save(model, tmp_path / "again")
    assert same(stored(tmp_path / "again"), folder.tensors())


def test_a_tied_head_that_differs_is_refused(copy: Any) -> None:
    folder = copy("huginn-tiny")
    tensors = folder.tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1e-3
    folder.store(tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight and transformer.wte.weight are tied .* differ"):
        load(folder.path)


def test_a_tied_ouro_may_store_its_table_once(copy: Any) -> None:
    folder = copy("ouro-tiny")
    folder.configure(tie_word_embeddings=True)
    tensors = folder.tensors()
    table = tensors.pop("model.embed_tokens.weight")
    folder.store(tensors | {"lm_head.weight": table})
    assert torch.equal(load(folder.path).head_weight, table)


def test_without_the_rotary_table(copy: Any, golden: Path) -> None:
    folder = copy("huginn-tiny")
    tensors = folder.tensors()
    del tensors["freqs_cis"]
    folder.store(tensors)
    assert load(folder.path).config == load(golden / "huginn-tiny").config


def test_a_wrong_rotary_table_is_refused(copy: Any) -> None:
    folder = copy("huginn-tiny")
    folder.configure(rope_base=10_000)
    with pytest.raises(CheckpointError, match=r"freqs_cis is not the rotary table of rope_base=10000"):
        load(folder.path)


def test_all_that_does_not_fit_is_said_in_one_line(copy: Any) -> None:
    folder = copy("ouro-tiny")
    tensors = folder.tensors()
    del tensors["model.norm.weight"]
    for layer in range(7):
        tensors[f"model.layers.{layer}.bias"] = torch.zeros(3)
    tensors["lm_head.weight"] = torch.zeros(320, 63)
    folder.store(tensors)
    with pytest.raises(CheckpointError) as caught:
        load(folder.path)
    message = str(caught.value)
    assert "\n" not in message
    assert "7 unexpected (model.layers.0.bias, " in message
    assert "model.layers.4.bias, ...)" in message
    assert "1 missing (model.norm.weight)" in message
    assert "1 misshapen (lm_head.weight is [320, 63] and should be [320, 64])" in message


def test_quantised_weights_are_refused(copy: Any) -> None:
    folder = copy("ouro-tiny")
    tensors = folder.tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    folder.store(tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is stored in a dtype that weights do not have"):
        load(folder.path)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("ouro-tiny", {"hidden_size": ...}, "config.json has no 'hidden_size'"),
    ("ouro-tiny", {"hidden_size": "64"}, "hidden_size='64'; a whole number is needed"),
    ("ouro-tiny", {"hidden_size": True}, "hidden_size=True"),
    ("ouro-tiny", {"num_attention_heads": 0}, "heads=0: allowed is 1 or more"),
    ("ouro-tiny", {"num_key_value_heads": 3}, "heads must be a multiple of kv_heads"),
    ("ouro-tiny", {"head_dim": [16]}, r"head_dim=\[16\]"),
    ("ouro-tiny", {"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
    ("ouro-tiny", {"total_ut_steps": 0}, "loops=0: allowed is 1 or more"),
    ("ouro-tiny", {"rope_theta": {}}, "rope_theta={}"),
    ("ouro-tiny", {"rope_parameters": 5}, "rope_parameters=5; an object is needed"),
    ("ouro-tiny", {"rope_scaling": {"rope_type": "yarn"}}, "scaled rotary positions"),
    ("ouro-tiny", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("ouro-tiny", {"use_sliding_window": True}, "use_sliding_window=true"),
    ("ouro-tiny", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ("ouro-tiny", {"loopwise": {"trained_loops": "all"}}, r"trained_loops='all'; \[fewest, most\] is needed"),
    ("ouro-tiny", {"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    ("ouro-tiny", {"num_hidden_layers": 4}, "missing"),
    ("huginn-tiny", {"injection_type": "add"}, "injection_type='add'; only 'linear' is read"),
    ("huginn-tiny", {"state_init": "zero"}, "state_init='zero'"),
    ("huginn-tiny", {"test_time_noise": 0.1}, "test_time_noise=0.1; only 0 is read"),
    ("huginn-tiny", {"n_embd": 0}, "width=0"),
    ("huginn-tiny", {"init_values": []}, "init_values=.*an object is needed"),
    ("huginn-tiny", {"mean_recurrence": None}, "mean_recurrence=None"),
    ("huginn-tiny", {"model_type": "gpt2"}, "model_type='gpt2'; supported are ouro, huginn_raven, loopwise"),
    ("huginn-tiny", {"model_type": ...}, "model_type=None; supported are"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_config_values(name: str, changes: dict[str, Any], message: str, copy: Any) -> None:
    folder = copy(name)
    folder.configure(**changes)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load(folder.path).eval()
    assert "\n" not in str(caught.value)


WRONG_NATIVE: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "unknown colour; allowed are vocab_size"),
    ({"width": 16.0}, "width=16.0; a whole number is needed"),
    ({"gate": "yes"}, "gate='yes'; true or false is needed"),
    ({"norm": "layer"}, "norm='layer'; allowed are"),
    ({"trained_loops": [3]}, r"trained_loops=\[3\]"),
    ({"rotary_scaling": {"factor": 2.0, "speed": 1}}, "speed"),
    ({"rotary_scaling": 3}, "rotary_scaling=3"),
    ({"loops": ...}, "loops"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_NATIVE, ids=lambda value: str(value)[:30])
def test_wrong_values_in_our_own_config(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(own(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_special_ids_that_the_family_knows_better(copy: Any, tmp_path: Path) -> None:
    folder = copy("ouro-tiny")
    published = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    folder.configure(**published)
    assert inspect(folder.path).special.eos == (0,)  # 320 tokens are not SmolLM2's vocabulary
    folder.configure(vocab_size=49152, **published)
    special = inspect(folder.path).special
    assert (special.bos, special.eos, special.pad) == (1, (2, 0), 0)
    folder.configure(vocab_size=49152, eos_token_id=7)
    assert inspect(folder.path).special.eos == (7,)

    huginn = copy("huginn-tiny")
    huginn.configure(vocab_size=65536)
    special = inspect(huginn.path).special
    assert (special.bos, special.eos, special.pad) == (65504, (65505, 65508), 65509)


def test_special_ids_travel_between_families(golden: Path, tmp_path: Path) -> None:
    save(load(golden / "ouro-tiny"), tmp_path, family="loopwise")
    assert dataclasses.asdict(inspect(tmp_path).special) == {"bos": 1, "eos": (2,), "pad": 0}


def test_the_three_kinds_of_raven_are_told_apart_by_config_alone(copy: Any) -> None:
    folder = copy("huginn-tiny")
    (folder.path / "model.safetensors").unlink()
    assert inspect(folder.path).config.norm == "pre_post"
    folder.configure(qk_bias=False)
    assert inspect(folder.path).config.norm == "pre"
    folder.configure(auto_map={"AutoModelForCausalLM": "raven_modeling_minimal_olmo.RavenForCausalLM"})
    assert inspect(folder.path).config.norm == "branch"


def test_both_spellings_of_llama_rotary_positions(copy: Any) -> None:
    folder = copy("huginn-tiny")
    (folder.path / "model.safetensors").unlink()
    stretched = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder.configure(qk_bias=False, rope_base=50_000, rope_theta=1e4, rope_scaling=stretched)
    old = inspect(folder.path).config
    folder.configure(rope_theta=..., rope_scaling=..., rope_parameters=stretched | {"rope_theta": 1e4})
    assert inspect(folder.path).config == old
    assert old.rotary_base == 1e4
    assert old.rotary_scaling == RotaryScaling(factor=32.0, original_positions=64)
    folder.configure(rope_parameters=...)
    assert inspect(folder.path).config.rotary_base == 50_000
    folder.configure(rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(CheckpointError, match="rotary positions of type 'yarn'"):
        inspect(folder.path)
