"""Folders and hub ids through transformers' Auto classes, and back again in the family's own names."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import loopwise
from loopwise.errors import CheckpointError, ConfigError, InputError, NotFoundError
from loopwise.hf import (
    LoopedForCausalLM,
    LoopedPreTrainedConfig,
    LoopwiseForCausalLM,
    OuroForCausalLM,
    RavenForCausalLM,
    wrap,
)
from loopwise.hub.tokenizer import Tokenizer

TESTS = Path(__file__).parents[1]
OURO, HUGINN = TESTS / "golden/ouro-tiny", TESTS / "golden/huginn-tiny"
tiny = runpy.run_path(str(TESTS / "models/naive_lm.py"))["tiny"]
TOKENS = torch.tensor([[3, 1, 22, 7, 7, 0], [5, 5, 9, 14, 2, 8]])


@pytest.fixture
def native(tmp_path: Path) -> Path:
    loopwise.save(tiny("coda"), tmp_path / "native")
    return tmp_path / "native"


@pytest.mark.parametrize(("folder", "kind"), [(OURO, OuroForCausalLM), (HUGINN, RavenForCausalLM), (None, None)])
def test_a_folder_opens_as_its_family_with_the_same_numbers(
    folder: Path | None, kind: type[LoopedForCausalLM] | None, native: Path
) -> None:
    folder, kind = folder or native, kind or LoopwiseForCausalLM
    expected = loopwise.load(folder, dtype="float64")
    for opened in (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
        AutoModelForCausalLM.from_pretrained(str(folder), dtype="float64", trust_remote_code=False),
        LoopedForCausalLM.from_pretrained(folder, dtype="float64", device_map="cpu"),
        kind.from_pretrained(folder, dtype="float64", device_map={"": "cpu"}),
    ):
        assert type(opened) is kind
        assert not opened.training
        assert opened.config.num_loops == expected.config.loops
        assert opened.config.num_hidden_layers == expected.config.layers
        assert opened.config.hidden_size == expected.config.width
        assert opened.config.name_or_path == str(folder)
        assert opened.dtype == opened.config.dtype == torch.float64
        with torch.no_grad():
            assert torch.equal(opened(TOKENS).logits, expected(TOKENS).logits)
            assert torch.equal(opened(TOKENS, num_loops=2).logits, expected(TOKENS, loops=2).logits)


@pytest.mark.parametrize("folder", [OURO, HUGINN])
def test_saving_gives_the_familys_files_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loopwise.load(tmp_path).config == loopwise.load(folder).config


def test_shards_and_foreign_weights_are_written_too(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(OURO)
    halved = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB", state_dict=halved)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(halved[name], tensor) for name, tensor in again.state_dict().items())
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()


def test_the_tokenizer_travels_and_transformers_reads_it(tmp_path: Path) -> None:
    model = loopwise.load(OURO)
    model.tokenizer = Tokenizer.bytes()
    loopwise.save(model, tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    read = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert read("née").input_ids == model.tokenizer.encode("née")


def test_generation_settings_have_the_familys_right_ids(tmp_path: Path) -> None:
    raw = json.loads((OURO / "config.json").read_text())
    # What every published Ouro says; the ids of its chat format are 1 and 2.
    wrong = {"vocab_size": 49152, "hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    raw |= wrong | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "intermediate_size": 4}
    config = AutoConfig.for_model(**raw)
    assert config.to_dict() == raw
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=0, temperature=0.5, do_sample=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = model.generation_config
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, [2, 0], 0)
    assert found.temperature == 0.5
    found.temperature = 0.7
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config.temperature == 0.7


def test_a_hub_id_is_read_from_the_cache_without_a_network(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--looped"
    shutil.copytree(OURO, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    model = AutoModelForCausalLM.from_pretrained("somebody/looped", cache_dir=tmp_path)
    assert torch.equal(model(TOKENS).logits, AutoModelForCausalLM.from_pretrained(OURO)(TOKENS).logits)
    with pytest.raises((OSError, NotFoundError)):
        AutoModelForCausalLM.from_pretrained("somebody/else", cache_dir=tmp_path)
    with pytest.raises(NotFoundError, match="not a folder here, and not to be had from the hub"):
        OuroForCausalLM.from_pretrained("somebody/else", cache_dir=tmp_path)


def test_a_checkpoints_own_code_is_never_asked_for(tmp_path: Path) -> None:
    shutil.copytree(OURO, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "configuration_ouro.Config", "AutoModelForCausalLM": "modeling_ouro.Model"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for trust in (None, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert isinstance(model, OuroForCausalLM)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text()) == raw


def test_keys_of_the_config_change_the_model_and_its_file(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(OURO, total_ut_steps=2, rms_norm_eps=0.5)
    same = AutoModelForCausalLM.from_pretrained(OURO, num_loops=2, rms_norm_eps=0.5)
    assert model.model.config.norm_eps == 0.5
    assert model.model.config.trained_loops == (1, 4)
    plain = AutoModelForCausalLM.from_pretrained(OURO)
    assert torch.equal(model(TOKENS).logits, same(TOKENS).logits)
    assert not torch.allclose(model(TOKENS).logits, plain(TOKENS, num_loops=2).logits)
    plain.config.total_ut_steps = 3
    assert torch.equal(plain(TOKENS).logits, plain(TOKENS, num_loops=3).logits)
    plain.save_pretrained(tmp_path)
    again = loopwise.load(tmp_path)
    assert (again.config.loops, again.config.trained_loops) == (3, (1, 4))


def test_models_are_built_from_a_config_or_around_a_loaded_model() -> None:
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(HUGINN)
    first, second = (AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2))
    assert not torch.equal(first.model.embed.weight, second.model.embed.weight)
    assert first.model.config == config.looped
    loaded = loopwise.load(OURO)
    wrapped = wrap(loaded)
    assert type(wrapped) is OuroForCausalLM
    assert wrapped.model is loaded
    assert type(wrap(tiny("universal"))) is LoopwiseForCausalLM


def test_the_vocabulary_can_grow(tmp_path: Path) -> None:
    for folder in (OURO, HUGINN):
        model = AutoModelForCausalLM.from_pretrained(folder)
        before = model(TOKENS).logits
        model.resize_token_embeddings(331, mean_resizing=False)
        torch.testing.assert_close(model(TOKENS).logits[..., :320], before, rtol=0, atol=0)
        model.save_pretrained(tmp_path / folder.name)
        again = loopwise.load(tmp_path / folder.name)
        assert again.config.vocab_size == 331
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_lops": 2}, "num_lops=2: did you mean 'num_loops'"),
        ({"quantization_config": {"load_in_4bit": True}}, "allowed are config, dtype"),
        ({"attn_implementation": "flash_attention_2"}, "a looped model uses 'sdpa'"),
        ({"device_map": {"embed": 0, "core": 1}}, "stays on one device"),
        ({"hidden_size": 32}, "ask for other tensors"),
        ({"objective": "expectd"}, "did you mean 'expected'"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, AttributeError), match=message):
        AutoModelForCausalLM.from_pretrained(OURO, **options)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="family huginn_raven; OuroForCausalLM does not read it"):
        OuroForCausalLM.from_pretrained(HUGINN)
    with pytest.raises(ConfigError, match="total_ut_step=3: did you mean 'total_ut_steps'"):
        AutoConfig.from_pretrained(OURO, total_ut_step=3)
    model = AutoModelForCausalLM.from_pretrained(OURO)
    with pytest.raises(ConfigError, match="does not take push_to_hub, variant"):
        model.save_pretrained(tmp_path, push_to_hub=True, variant="fp16")
    with pytest.raises(ConfigError, match="max_shard_size='many'"):
        model.save_pretrained(tmp_path, max_shard_size="many")
    with pytest.raises(InputError, match=r"tensors missing: .*unexpected: \['other'\]"):
        model.load_state_dict({"other": torch.zeros(1)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(OURO)}))
    with pytest.raises(ConfigError, match=r"AutoPeftModelForCausalLM\.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_config_class_keeps_the_file_and_answers_to_standard_names() -> None:
    for folder in (OURO, HUGINN):
        raw = json.loads((folder / "config.json").read_text())
        config = AutoConfig.from_pretrained(folder)
        assert isinstance(config, LoopedPreTrainedConfig)
        assert config.to_dict() == raw
        assert json.loads(config.to_json_string()) == raw
        assert config == AutoConfig.from_pretrained(folder)
        assert (config.num_attention_heads, config.head_dim, config.vocab_size) == (4, 16, 320)
