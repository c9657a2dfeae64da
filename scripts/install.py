"""Make the virtual environment of this checkout; the Makefile calls it, with the standard library alone.

On Linux the registry's default torch is a CUDA build of gigabytes. So, in this order: what `--torch` says is
installed; else a torch in range that belongs to the running Python is reused; else the pinned one is installed.

Reuse links torch, and what its build needs beyond the pinned packages (CUDA libraries, Triton), into a folder of
the environment that a .pth file puts last on the path. `--system-site-packages` would be shorter, but lets every
other package of that Python in: stale pytest plugins, a peft that predates transformers 5. It also finds nothing
when that Python is itself a virtual environment. The folder is apart from site-packages so that a later
`pip install torch` never writes through a link.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def normalised(name: str) -> str:
    """The registry's spelling of a distribution name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Name to whole line, of every package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normalised(line.split("==")[0]): line for line in lines if "==" in line}


def in_range(version: str) -> bool:
    """Whether pyproject.toml allows this version of torch."""
    bounds = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert bounds is not None, "pyproject.toml gives torch no range"
    low, high = (tuple(map(int, pair)) for pair in (bounds.groups()[:2], bounds.groups()[2:]))
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and low <= tuple(map(int, found.groups())) < high


def torch_build(pinned: set[str]) -> list[metadata.Distribution]:
    """This Python's torch and, of all it requires, whatever is installed here and not pinned."""
    build: dict[str, metadata.Distribution] = {}
    visited: set[tuple[str, str]] = set()
    waiting = [("torch", "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in visited or (name in pinned and name != "torch"):
            continue
        visited.add((name, extra))
        try:
            build[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for requirement in build[name].requires or ():
            wanted = re.match(r"([\w.-]+)\s*(?:\[([^\]]*)\])?", requirement)
            only_for = re.search(r"extra\s*==\s*[\"']([^\"']+)", requirement)
            if wanted is not None and (only_for is None or only_for.group(1) == extra):
                extras = (wanted.group(2) or "").split(",")
                waiting += [(normalised(wanted.group(1)), part.strip()) for part in ("", *extras)]
    return list(build.values())


def link(build: list[metadata.Distribution], venv: Path) -> None:
    """Link the top-level entries of the distributions into `venv`/reused and put that last on its path."""
    folder = venv / "reused"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for distribution in build:
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "reused.pth").write_text(f"{folder.resolve()}\n")


def run(*command: str | Path) -> None:
    """Run a command in the root of the checkout; where it fails, say so in one line and stop."""
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit(f"error: this failed: {shlex.join(map(str, command))}")


def says(python: Path, code: str) -> str:
    """What a line of Python prints in the environment; nothing where it fails."""
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def provide_torch(venv: Path, requested: str) -> None:
    """Bring a torch in range into the environment, saying which and why."""
    try:
        own = metadata.version("torch")
    except metadata.PackageNotFoundError:
        own = ""
    pip = (venv / "bin/python", "-m", "pip", "install", "--disable-pip-version-check")
    ask = "from importlib.metadata import version; print(version('torch'))"
    if requested:
        print(f"torch: installing {requested!r}, as TORCH says", flush=True)
        run(*pip, *shlex.split(requested))
    elif own and in_range(own):
        print(f"torch: reusing {own} of {sys.executable}", flush=True)
        link(torch_build(set(pins())), venv)
    elif says(venv / "bin/python", ask).partition("+")[0] != pins()["torch"].removeprefix("torch=="):
        print(f'torch: installing {pins()["torch"]}; for another build type: make TORCH="REQUIREMENT"', flush=True)
        run(*pip, "--quiet", pins()["torch"])
    version = says(venv / "bin/python", ask)
    if not in_range(version):
        sys.exit(f"error: torch {version} is out of pyproject.toml's range; type: make TORCH='{pins()['torch']}'")


def main() -> None:
    """Make or bring up to date the environment that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--python", default="", help="how the Makefile names this Python; remembered")
    parser.add_argument("--torch", default="", help="a pip requirement, with options if need be")
    parser.add_argument("--extras", default="", help="extras of the package, with commas between")
    options = parser.parse_args()
    venv: Path = options.venv.absolute()

    remembered = {venv / ".python": options.python, venv / ".torch": options.torch}
    if any(file.exists() and file.read_text() != text for file, text in remembered.items()):
        shutil.rmtree(venv)
    if not (venv / "bin/python").exists():
        print(f"making {venv} with {sys.executable} ({sys.version.split()[0]}); once, some minutes", flush=True)
        run(sys.executable, "-m", "venv", venv)
    for file, text in remembered.items():
        file.write_text(text)

    provide_torch(venv, options.torch)
    constraints = venv / "constraints.txt"
    constraints.write_text("\n".join(line for name, line in pins().items() if name != "torch") + "\n")
    package = f".[{options.extras}]" if options.extras else "."
    pip = (venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--constraint", constraints, "--editable", package)
    check = "import torch; print(int(torch.ones(2).sum()))"
    if says(venv / "bin/python", check) != "2" and (venv / "reused").exists():
        print(f"torch: the one of {sys.executable} does not work when linked; installing {pins()['torch']}", flush=True)
        shutil.rmtree(venv / "reused")
        run(*pip, pins()["torch"])
    if says(venv / "bin/python", check) != "2":
        sys.exit(f"error: torch does not work in {venv}; type: make TORCH='{pins()['torch']}'")


if __name__ == "__main__":
    main()
