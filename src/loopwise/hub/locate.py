"""Find a checkpoint: a local folder, or a hub id that is fetched once and then cached."""

import json
from pathlib import Path
from typing import Any

from loopwise.errors import CheckpointError, NotFoundError

SHIPPED = "shipped"
"""The name of the small trained checkpoint that comes with the package."""
_SHIPPED_FOLDER = Path(__file__).parents[1] / "shipped"
_SMALL = ("*.json", "*.jinja")
_WEIGHTS = ("*.safetensors",)


def locate(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint.

    A path that exists is used as it is, but of a training run's folder its `model`. `shipped` is the small checkpoint
    of this package. `org/name` is fetched from the hub into its cache (no network when `HF_HUB_OFFLINE=1`; pickled
    weights are never fetched).

    Args:
        weights: whether a hub id's weights are needed too, and not only its small files.

    Raises:
        NotFoundError: when there is neither such a folder nor such a hub id within reach, or a run has no model yet.
    """
    if str(path_or_id) == "":
        raise NotFoundError("the checkpoint's path is empty; give a folder, or a hub id of the form organisation/name")
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return _model_of_run(folder) if _is_run(folder) else folder
    if folder.is_file():
        raise NotFoundError(f"{path_or_id} is a file; give the folder that holds config.json and *.safetensors")
    name = str(path_or_id)
    if name == SHIPPED:
        return _SHIPPED_FOLDER
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise NotFoundError(f"{name}: no such folder, and not a hub id of the form organisation/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*_SMALL, *(_WEIGHTS if weights else ())]))
    except HFValidationError as error:
        raise NotFoundError(f"{name}: not a folder, and not a valid hub id ({error})") from None
    except LocalEntryNotFoundError:
        raise NotFoundError(
            f"{name}: not a folder, not in the hub cache, and the hub is out of reach (offline?); "
            "give a local folder, or fetch it once with a network"
        ) from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFoundError(f"{name}: not a folder here, and the hub answered: {reason}") from None


def _is_run(folder: Path) -> bool:
    """Whether this is what `loopwise train` made: a config.json of its own, which is no checkpoint's."""
    if not (folder / "config.json").is_file():
        return (folder / "model" / "config.json").is_file()
    raw = read_json(folder / "config.json")
    return "model_type" not in raw and "stages" in raw


def _model_of_run(folder: Path) -> Path:
    if not (folder / "model" / "config.json").is_file():
        raise NotFoundError(f"the run {folder} has not written its model yet; let it end (the same command resumes it)")
    return folder / "model"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        NotFoundError: when the file is not there.
        CheckpointError: when it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{path.parent} has no {path.name}; a checkpoint folder needs one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch or write it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
    return value
