"""Where text comes from: this Python's library, files, JSON lines, Parquet, and `datasets`.

Each source is a function without arguments that starts a new pass over its documents, always in the same order.
"""

import glob
import hashlib
import importlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loopwise.errors import ConfigError, InputError, MissingExtraError, NotFoundError

Source = Callable[[], Iterator[str]]

KINDS = (
    "python, a folder, a text file, a glob such as 'notes/*.txt', FILE.jsonl:FIELD, FILE.parquet:COLUMN "
    "or hf:ORG/NAME:SPLIT:FIELD"
)
_PROSE = {".txt", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".xml", ".json", ".yaml", ".toml"}
_CODE = {
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
    ".css",
    ".rb",
    ".sh",
    ".sql",
}
TEXT_SUFFIXES = frozenset(_PROSE | _CODE)
"""What a folder's text files end in; a glob or a file name takes any other."""

_JSON_LINES = frozenset({".jsonl", ".ndjson"})
_DATASET = re.compile(r"hf:(?P<name>[^:@]+)(@(?P<config>[^:]+))?(:(?P<split>[^:\[]+(\[[^\]]*\])?))?(:(?P<field>.+))?")
# Charmap tables, tests and generated build settings are no prose and hardly code; the rest is other people's.
_NOT_LIBRARY = frozenset({"encodings", "test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"})


def find_source(spec: str) -> Source:
    """The source that a corpus name or path stands for; `Corpus` says what names there are.

    Raises:
        NotFoundError: there is no such file, folder or match.
        ConfigError: a field is named for plain text, or a data set's name is malformed.
        InputError: a folder holds no text.
    """
    if spec == "python":
        return python_library
    if spec.startswith("hf:"):
        return _dataset(spec)
    path, field = _path_and_field(spec)
    files = [file for file in path if file.is_file()]
    if not files:
        raise InputError(f"{spec} holds no text file; give a glob such as '{spec}/**/*' that names its files")
    if field is not None and not any(_has_fields(file) for file in files):
        raise ConfigError(f"{spec} is plain text, which has no field {field!r}; leave ':{field}' out")
    return lambda: (text for file in files for text in _documents(file, field))


def python_library() -> Iterator[str]:
    """The sources of this Python's standard library, documentation strings included; one module, one document.

    Real text that every machine has. The order is that of the paths' digests, so that the first few megabytes are a
    fair sample of the whole. Left out: tests, idlelib, installed packages, character tables, generated
    files, and the few modules that are not UTF-8.

    Raises:
        NotFoundError: this Python was installed without its library's sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = False
    for path in sorted((file.relative_to(root) for file in root.rglob("*.py")), key=_scrambled):
        parts = path.parts
        if _NOT_LIBRARY.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = _text_of(root / path)
        except InputError:
            continue
        found = True
        yield text
    if not found:
        raise NotFoundError(f"this Python has no library sources in {root}; give a folder of text instead of 'python'")


def _scrambled(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()


def _path_and_field(spec: str) -> tuple[list[Path], str | None]:
    before, colon, after = spec.rpartition(":")
    for path, field in ((spec, None), (before, after)) if colon and before and after else ((spec, None),):
        matches = _files_at(Path(path).expanduser())
        if matches is not None:
            return matches, field
    raise NotFoundError(f"there is no corpus {spec!r}; give {KINDS}")


def _files_at(path: Path) -> list[Path] | None:
    """Files of a folder, a file, or a glob, sorted; `None` where nothing is there."""
    if path.is_dir():
        files = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        return sorted(file for file in files if file.suffix.lower() in TEXT_SUFFIXES or _has_fields(file))
    if path.exists():
        return [path]
    return sorted(Path(match) for match in glob.glob(str(path), recursive=True)) or None


def _has_fields(file: Path) -> bool:
    return file.suffix.lower() in _JSON_LINES or file.suffix.lower() == ".parquet"


def _documents(file: Path, field: str | None) -> Iterator[str]:
    if file.suffix.lower() in _JSON_LINES:
        return _json_lines(file, field or "text")
    if file.suffix.lower() == ".parquet":
        return _parquet(file, field or "text")
    return iter((_text_of(file),))


def _text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 text (byte {error.start}); convert it, or leave it out with a glob"
        ) from error
    except OSError as error:
        raise NotFoundError(f"{file} cannot be read: {error.strerror}; check the path and its permissions") from error


def _json_lines(file: Path, field: str) -> Iterator[str]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _joined(_record(line, f"{file} line {number}"), field, f"{file} line {number}", str(file))
    except OSError as error:
        raise NotFoundError(f"{file} cannot be read: {error.strerror}; check the path and its permissions") from error


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}; mend or remove the line") from error
    if not isinstance(record, dict):
        raise InputError(f'{where} is not a JSON object; write {{"text": "…"}}')
    return record


def _parquet(file: Path, field: str) -> Iterator[str]:
    parquet = _optional("pyarrow.parquet", "pyarrow")
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a Parquet file: {_first_line(error)}; fetch it again") from error
    columns = field.split("+")
    _check_fields(columns, table.schema_arrow.names, str(file), str(file))
    for batch in table.iter_batches(columns=columns):
        for record in batch.to_pylist():
            yield _joined(record, field, str(file), str(file))


def _dataset(spec: str) -> Source:
    parts = _DATASET.fullmatch(spec)
    if parts is None:
        raise ConfigError(
            f"{spec!r} does not name a data set; write hf:ORG/NAME:SPLIT:FIELD, as hf:ORG/NAME:train:text"
        )
    field = parts["field"] or "text"

    def documents() -> Iterator[str]:
        datasets = _optional("datasets", "datasets")
        try:
            data = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"] or "train")
        except (OSError, ValueError) as error:
            raise NotFoundError(
                f"cannot open {spec}: {_first_line(error)}; write hf:ORG/NAME:SPLIT:FIELD (hf:ORG/NAME@CONFIG:… for "
                "one of several configurations) and check the network"
            ) from error
        _check_fields(
            field.split("+"), list(data.column_names), spec, f"hf:{parts['name']}:{parts['split'] or 'train'}"
        )
        for record in data:
            yield _joined(record, field, spec, spec)

    return documents


def _joined(record: Mapping[str, Any], field: str, where: str, example: str) -> str:
    names = field.split("+")
    _check_fields(names, list(record), where, example)
    values = [record[name] for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}: field {name!r} holds a {type(value).__name__}, not text; name another field")
    return "\n".join(value for value in values if value)


def _check_fields(names: list[str], present: list[str], where: str, example: str) -> None:
    for name in names:
        if name not in present:
            raise InputError(
                f"{where} has no field {name!r}; it has {', '.join(present)}; "
                f"type {example}:FIELD, or FIELD+FIELD to join"
            )


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, "train") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
