"""What a start costs and says: nothing heavy is imported before it is needed, and nothing is printed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = "[name for name in ('ray', 'torch', 'transformers', 'peft', 'pyarrow') if name in sys.modules]"
COMMAND = "from emloc_ray.ui.cli import main; main()"


def said(code: str, *arguments: str) -> str:
    """What a fresh process prints; it must end well and write nothing to stderr."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_the_package_imports_nothing_heavy_and_prints_nothing() -> None:
    assert said("import emloc_ray") == ""
    assert said(f"import sys, emloc_ray; print({HEAVY})") == "[]\n"


@pytest.mark.parametrize("verb", ["--help", "keys"])
def test_help_and_keys_import_nothing_heavy(verb: str) -> None:
    code = f"import atexit, sys; sys.argv[1:] = [{verb!r}]; atexit.register(lambda: print({HEAVY})); {COMMAND}"
    assert said(code).endswith("[]\n")


@pytest.mark.slow
def test_importing_transformers_stays_as_light_as_it_is() -> None:
    assert said("import sys, emloc_ray, transformers; print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(
            "import emloc_ray; from transformers import AutoConfig, AutoModelForCausalLM", marks=pytest.mark.slow
        ),
        pytest.param(
            "import transformers, emloc_ray; from transformers import AutoConfig, AutoModelForCausalLM",
            marks=pytest.mark.deep,  # as the next: each takes as long as 100 others
        ),
        pytest.param(
            "from transformers import AutoConfig, AutoModelForCausalLM; import emloc_ray", marks=pytest.mark.deep
        ),
    ],
    ids=["emloc_ray first", "transformers first", "Auto classes first"],
)
def test_emulators_open_in_either_order_of_imports(emulator_dir: Callable[[str], Path], imports: str) -> None:
    code = f"""
import sys
{imports}
print(AutoConfig.from_pretrained(sys.argv[1]).model_type)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].self_attn.q_proj).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(emulator_dir("llama"))], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["emloc_emulator", "FactorizedLinear"], done.stderr


def test_a_reader_that_leaves_ends_keys_without_a_word() -> None:
    command = [sys.executable, "-c", COMMAND, "keys"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as keys:
        assert keys.stdout is not None
        assert keys.stderr is not None
        keys.stdout.close()  # before it writes: what head does after its lines, at the earliest
        assert (keys.stderr.read(), keys.wait(timeout=300)) == (b"", 0)
