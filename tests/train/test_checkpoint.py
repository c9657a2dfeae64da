import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from loopwise.errors import CheckpointError, CheckpointWarning, ConfigError, NotFoundError, StorageError
from loopwise.train import checkpoint
from loopwise.train.checkpoint import flatten, load, newest, prune, save, steps, unflatten


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*as_bytes)


def little(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 5), float(step)), "count": torch.tensor(step)}


def visible(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    wide = torch.randn(6, 10, dtype=torch.float64)
    tensors = {f"of/{dtype}": (wide * 3).to(dtype) for dtype in checkpoint.DTYPE_NAMES if dtype != torch.bool}
    tensors["bool"] = wide > 0
    tensors["scalar"] = torch.tensor(float("nan"))
    tensors["empty"] = torch.empty(0, 4)
    tensors["transposed"] = wide.T
    tensors["tied"] = wide
    tensors["parameter"] = torch.nn.Parameter(wide.float())
    tensors["größe"] = torch.tensor([float("-inf"), -0.0])
    path = save(tmp_path, 7, tensors, {"seed": 3, "loss": 0.1 + 0.2, "nothing": None, "odd": float("inf")})
    found = newest(tmp_path)
    assert found is not None
    assert (found.path, found.step) == (path, 7)
    assert found.meta == {"seed": 3, "loss": 0.1 + 0.2, "nothing": None, "odd": float("inf")}
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(found.tensors[name], tensor.detach()), name


def test_the_file_is_plain_safetensors_with_the_permissions_of_the_user(tmp_path):
    path = save(tmp_path, 1, little(1), {})
    other = tmp_path / "other"
    other.touch()
    assert torch.equal(load_file(path / "state.safetensors")["weight"], little(1)["weight"])
    assert (path / "state.safetensors").stat().st_mode == other.stat().st_mode


def test_nothing_there_is_none_and_a_wrong_path_is_an_error(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    with pytest.raises(NotFoundError, match="no checkpoint folder"):
        load(tmp_path / "step-00000001")


def test_newest_is_by_number_and_ignores_foreign_names(tmp_path):
    for step in (9, 100_000_000, 20):
        save(tmp_path, step, little(step), {})
    (tmp_path / "step-zero").mkdir()
    (tmp_path / "notes.txt").touch()
    assert steps(tmp_path) == [9, 20, 100_000_000]
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip_first(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


def damage_flip_middle(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data)


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip_first, damage_flip_middle, damage_empty, damage_remove]
)
def test_a_broken_checkpoint_is_passed_over_with_one_line(tmp_path, name, damage):
    for step in (1, 2):
        save(tmp_path, step, little(step), {"step": step})
    damage(tmp_path / "step-00000002" / name)
    with pytest.raises(CheckpointError):
        load(tmp_path / "step-00000002")
    with pytest.warns(CheckpointWarning) as caught:
        found = newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_a_manifest_of_another_step_is_refused(tmp_path):
    save(tmp_path, 1, little(1), {})
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="does not belong"):
        load(tmp_path / "step-00000002")


def test_a_later_format_is_named(tmp_path):
    path = save(tmp_path, 1, little(1), {}) / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="format version 2"):
        load(path.parent)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 4, little(4), {"try": 1})
    damage_truncate(tmp_path / "step-00000004" / "state.safetensors")
    save(tmp_path, 4, little(4), {"try": 2})
    save(tmp_path, 4, little(4), {"try": 3})
    found = newest(tmp_path)
    assert found is not None
    assert found.meta == {"try": 3}
    assert len(visible(tmp_path)) == 1
    assert steps(tmp_path) == [4]


def test_keep_and_every(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, little(step), {}, keep=2, every=3)
    assert steps(tmp_path) == [3, 6, 7, 8]
    assert prune(tmp_path, keep=1) == [3, 6, 7]
    assert steps(tmp_path) == [8]


def test_keep_never_removes_what_was_just_written(tmp_path):
    save(tmp_path, 9, little(9), {})
    damage_empty(tmp_path / "step-00000009" / "manifest.json")
    save(tmp_path, 5, little(5), {}, keep=1)
    assert load(tmp_path / "step-00000005").step == 5


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".writing-step-00000003").mkdir()
    (tmp_path / ".removing-step-00000001").mkdir()
    (tmp_path / ".writing-step-00000003" / "state.safetensors").write_bytes(b"half")
    assert newest(tmp_path) is None
    save(tmp_path, 4, little(4), {})
    assert visible(tmp_path) == ["step-00000004"]


def test_a_file_size_limit_leaves_the_earlier_checkpoint(tmp_path):
    save(tmp_path, 1, little(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError) as error:
            save(tmp_path, 2, {"big": torch.zeros(1_000_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert "step-00000002: File too large; earlier checkpoints are intact" in str(error.value)
    assert visible(tmp_path) == ["step-00000001"]
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("call", range(6))
def test_a_full_disk_at_any_call_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, call):
    save(tmp_path, 1, little(1), {})
    calls = 0

    def refusing(original):
        def wrapped(*arguments):
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments)

        return wrapped

    monkeypatch.setattr(os, "fsync", refusing(os.fsync))
    monkeypatch.setattr(os, "rename", refusing(os.rename))
    with pytest.raises(StorageError, match="No space left on device"):
        save(tmp_path, 2, little(2), {})
    monkeypatch.undo()
    # The last call syncs the parent after the rename: the new checkpoint is then visible, and must be whole.
    assert visible(tmp_path) == ["step-00000001"] + (["step-00000002"] if call == 5 else [])
    found = newest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors["count"], torch.tensor(found.step))


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="complex64"):
        save(tmp_path, 1, {"z": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(TypeError):
        save(tmp_path, 1, little(1), {"path": tmp_path})
    with pytest.raises(ConfigError):
        save(tmp_path, 1, little(1), {}, keep=0)
    assert visible(tmp_path) == []


def trained(make):
    torch.manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    optimiser = make(parameters)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimiser.step()
    return optimiser


def assert_same_tree(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert same_bits(left, right)
    elif isinstance(left, dict):
        assert [(type(key), key) for key in left] == [(type(key), key) for key in right]
        for key in left:
            assert_same_tree(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same_tree(a, b)
    else:
        assert repr(left) == repr(right)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1 / 3, betas=(0.9, 0.95)),
        lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True),
        lambda p: torch.optim.Muon(p),
        lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], momentum=0.9),
    ],
)
def test_optimiser_state_survives_the_disk_bit_for_bit(tmp_path, make):
    state = trained(make).state_dict()
    flat = flatten(state, "optimizer")
    assert all(name.startswith("optimizer/") for name in flat.tensors)
    save(tmp_path, 1, flat.tensors, {"optimizer": flat.skeleton})
    found = newest(tmp_path)
    assert found is not None
    assert_same_tree(unflatten(found.tensors, found.meta["optimizer"]), state)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(trees)
def test_any_nest_of_scalars_survives_json(tree):
    flat = flatten(tree, "t")
    assert_same_tree(unflatten(flat.tensors, json.loads(json.dumps(flat.skeleton))), tree)


def test_flatten_refuses_what_it_cannot_restore():
    with pytest.raises(CheckpointError, match="t/a is a set"):
        flatten({"a": {1}}, "t")
    with pytest.raises(CheckpointError, match="lacks tensor"):
        unflatten({}, flatten({"a": torch.zeros(1)}, "t").skeleton)


# Each round forks a writer that saves step after step. In the first rounds it dies at its n-th call to the
# operating system; in the later ones SIGKILL strikes from outside after a random time.
WRITER = """
import builtins, os, random, select, shutil, signal, sys
import torch
torch.set_num_threads(1)
from loopwise.train import checkpoint

def write(folder, start):
    for step in range(start, start + 1000):
        tensors = {"weight": torch.full((64, 64), float(step)), "count": torch.tensor(step)}
        checkpoint.save(folder, step, tensors, {"step": step}, keep=2)

def die_at(call):
    left = [call]
    def counted(original):
        def wrapped(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        return wrapped
    for name in ("fsync", "rename", "mkdir", "open", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))

folder, fixed_rounds, random_rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(0)
for number in range(fixed_rounds + random_rounds):
    seen = checkpoint.newest(folder)
    start = seen.step + 1 if seen else 0
    child = os.fork()
    if child == 0:
        if number < fixed_rounds:
            die_at(number)
        write(folder, start)
        os._exit(1)
    if number >= fixed_rounds:
        select.select([], [], [], chance.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    found = checkpoint.newest(folder)
    if found is None:
        assert seen is None, "a whole checkpoint was lost"
        continue
    assert seen is None or found.step >= seen.step, "the newest checkpoint was lost"
    assert found.meta["step"] == found.step == int(found.tensors["count"])
    assert bool((found.tensors["weight"] == found.step).all())
    print(found.step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path / "checkpoints"), "60", "20"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reached = [int(line) for line in done.stdout.split()]
    assert reached == sorted(reached)
    assert reached[-1] > 50, "the writers got nowhere, so the kills proved nothing"
    save(tmp_path / "checkpoints", reached[-1] + 1, little(0), {}, keep=1)
    assert len(visible(tmp_path / "checkpoints")) == 1
