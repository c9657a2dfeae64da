"""`loopwise convert`: formats, number types, deeper cores, retrofits, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopwise.cli import main
from loopwise.cli.convert import ConvertConfig
from loopwise.hub.checkpoints import load

GOLDEN = Path(__file__).parents[1] / "golden"
OURO, HUGINN = str(GOLDEN / "ouro-tiny"), str(GOLDEN / "huginn-tiny")


def convert(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    code = main(["convert", *map(str, words), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return dict(json.loads(said.out))


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["convert", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def plain_llama(folder: Path, layers: int) -> Path:
    """A checkpoint with the names and shapes of a Llama; 16 features, 2 heads over 1 key-value head."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(29, 16, generator=generator),
        "model.norm.weight": torch.ones(16),
    }
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (16, 16)),
            ("self_attn.k_proj", (8, 16)),
            ("self_attn.v_proj", (8, 16)),
            ("self_attn.o_proj", (16, 16)),
            ("mlp.gate_proj", (24, 16)),
            ("mlp.up_proj", (24, 16)),
            ("mlp.down_proj", (16, 24)),
        ):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_another_number_type_and_smaller_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = convert(capsys, OURO, tmp_path / "small", "dtype=bfloat16", "shard_size=100kB")
    assert (said["family"], said["dtype"], said["parameters"]) == ("ouro", "bfloat16", 192_385)
    assert said["files"] > 3
    small, whole = load(tmp_path / "small"), load(OURO)
    for ours, theirs in zip(small.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_into_our_format_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(capsys, HUGINN, tmp_path / "ours", "family=loopwise")["family"] == "loopwise"
    assert convert(capsys, tmp_path / "ours", tmp_path / "back", "family=huginn_raven")["family"] == "huginn_raven"
    original, back = (load_file(Path(folder) / "model.safetensors") for folder in (HUGINN, tmp_path / "back"))
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.items())
    assert "huginn_raven checkpoint; type: family=loopwise" in refused(
        capsys, OURO, tmp_path / "no", "family=huginn_raven"
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "copies"),
    [([], [0, 1, 2, 0, 1, 2]), (["order=stack"], [0, 1, 2] * 2), (["order=repeat"], [0, 0, 1, 1, 2, 2])],
)
def test_upcycling(words: list[str], copies: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = convert(capsys, OURO, tmp_path / "deep", "layers=6", *words)
    assert said["upcycle"]["copies"] == copies
    old, new = load_file(Path(OURO) / "model.safetensors"), load_file(tmp_path / "deep" / "model.safetensors")
    for place, layer in enumerate(copies):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(new[name.format(place)], old[name.format(layer)])


@pytest.mark.parametrize(
    ("layers", "words", "split"),
    [
        (22, ["retrofit=4,8,4"], "0-3 / 10-17 / 18-21"),
        (22, ["retrofit=auto"], "0-3 / 10-17 / 18-21"),
        (16, ["retrofit=auto"], "0-3 / 6-11 / 12-15"),
        (5, ["retrofit=[1,2,1]", "loops=4"], "0 / 2-3 / 4"),
        (5, ["prelude=0", "core=1,3"], "0 / 1,3 / none"),
    ],
)
def test_retrofits(
    layers: int, words: list[str], split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = plain_llama(tmp_path / "plain", layers)
    said = convert(capsys, source, tmp_path / "looped", *words)
    assert said["family"] == "huginn_raven"
    assert said["retrofit"]["text"] == split
    kept = [layer for part in ("prelude", "core", "coda") for layer in said["retrofit"][part]]
    assert sorted(kept + said["retrofit"]["dropped"]) == list(range(layers))
    model = load(tmp_path / "looped")
    assert model.config.loops == (4 if "loops=4" in words else 1)
    first_core = load_file(source / "model.safetensors")[
        f"model.layers.{said['retrofit']['core'][0]}.mlp.down_proj.weight"
    ]
    assert torch.equal(model.get_parameter("core.0.mlp.branch.down.weight"), first_core)
    with torch.no_grad():
        tokens = torch.arange(9)[None]
        assert torch.equal(model(tokens, loops=1, start=1).logits, model(tokens, loops=1, start="zero").logits)


def test_what_a_person_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = plain_llama(tmp_path / "plain", 6)
    assert main(["convert", str(source), str(tmp_path / "looped"), "retrofit=1,2,1", "layers=4"]) == 0
    said = capsys.readouterr().out
    assert "layers 0 / 3-4 / 5 (prelude / core / coda), 2 dropped" in said
    assert "core of 2 layers to 4, order stack" in said
    assert "huginn_raven, float32, " in said
    assert f"next       loopwise info {tmp_path / 'looped'}" in said


def test_an_existing_checkpoint_is_never_overwritten_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(capsys, OURO, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "holds a checkpoint already; choose another folder, or type: overwrite=true" in refused(
        capsys, OURO, tmp_path, "dtype=bfloat16"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert convert(capsys, tmp_path, tmp_path, "dtype=bfloat16", "overwrite=true")["dtype"] == "bfloat16"


MISTAKES: list[tuple[list[str], str]] = [
    (["layer=48"], "unknown key layer; did you mean layers"),
    (["family=llama"], "family"),
    (["dtype=int4"], "dtype"),
    (["shard_size=big"], "shard_size=big: give a size such as 5GB, 500MB or 2GiB"),
    (["shard_size=0GB"], "shard_size=0GB"),
    (["layers=7"], "layers=7: the core has 3; allowed are its multiples, 6 for one"),
    (["order=stack"], "order=stack belongs to upcycling; give layers="),
    (["loops=4"], "loops=4 belongs to a retrofit"),
    (["prelude=0-1"], "prelude= and coda= need core= beside them"),
    (["retrofit=1,1,1", "prelude=0", "core=1", "coda=2"], "retrofit=... chooses the layers itself"),
    (["retrofit=1,1,1"], "model_type='ouro' cannot be retrofitted; allowed are llama, olmo2"),
    (["dtype"], "'dtype' gives no value; type: key=value"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: str(value)[:30])
def test_mistakes_are_one_line_and_write_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, OURO, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_mistakes_about_plain_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = plain_llama(tmp_path / "plain", 5), tmp_path / "out"
    assert "becomes a looped model with: loopwise convert SOURCE TARGET retrofit=4,8,4" in refused(
        capsys, source, target
    )
    assert "the source has 5 layers" in refused(capsys, source, target, "retrofit=4,8,4")
    assert "knows the authors' choice for 22, 16 layers" in refused(capsys, source, target, "retrofit=auto")
    assert "give the sizes of prelude,core,coda" in refused(capsys, source, target, "retrofit=many")
    assert "is no list of layers" in refused(capsys, source, target, "prelude=a", "core=1", "coda=2")
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", target, "retrofit=1,1,1")
    assert not target.exists()


def test_help_names_every_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["convert", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"{field.name}=" in said for field in dataclasses.fields(ConvertConfig))
