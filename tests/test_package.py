"""The public face of the package, and what importing it costs."""

import subprocess
import sys

import pytest

import loopwise

HEAVY = "sorted({'torch', 'transformers', 'numpy', 'datasets', 'tokenizers'} & set(sys.modules))"


def loaded_by(code: str) -> str:
    """Which heavy packages a fresh interpreter holds after `code`."""
    script = f"import sys\n{code}\nprint({HEAVY}, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return result.stderr.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import loopwise; dir(loopwise)",
        "from loopwise.cli import main; assert main(['--help']) == 0",
        "from loopwise.cli import main; assert main([]) == 0",
        "from loopwise.cli import main; assert main(['--version']) == 0",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded_by(code) == "[]"


def test_the_probe_sees_what_is_imported() -> None:
    assert loaded_by("import numpy") == "['numpy']"


@pytest.mark.parametrize("name", sorted(loopwise._HOMES))
def test_every_public_name_is_where_the_table_says(name: str) -> None:
    assert name in dir(loopwise)
    assert getattr(loopwise, name).__name__ == name


def test_an_unknown_name_is_answered_with_a_near_one() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unrol'; did you mean 'unroll'"):
        _ = loopwise.unrol  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'xyz'; it has Engine, LoopTrace, LoopedLM"):
        _ = loopwise.xyz  # type: ignore[attr-defined]


def test_python_m_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "loopwise", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"loopwise {loopwise.__version__}\n")
