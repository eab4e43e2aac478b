"""`import qlora_core` is cheap, and what it promises is really there."""

import subprocess
import sys

import pytest

import qlora_core


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    done = run(
        "import sys, qlora_core, qlora_core.errors\n"
        "qlora_core.EngineError, dir(qlora_core)\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )

    assert done.returncode == 0, done.stderr


def test_using_the_layers_loads_torch_but_not_transformers() -> None:
    done = run(
        "import sys, qlora_core\n"
        "qlora_core.quantize_nf4, qlora_core.NF4Linear\n"
        "assert 'torch' in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
        "assert 'triton' not in sys.modules\n"
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", qlora_core.__all__)
def test_every_public_name_is_there(name: str) -> None:
    public = getattr(qlora_core, name)

    assert callable(public)
    assert public.__name__.rpartition(".")[2] == name


def test_train_can_be_called_also_when_its_package_was_imported_first() -> None:
    # The package of that name binds itself over the function; it can be called in its place.
    done = run(
        "import qlora_core, qlora_core.train.loop as loop\n"
        "from qlora_core import train\n"
        "assert callable(train) and train is qlora_core.train and callable(loop.train)\n"
    )

    assert done.returncode == 0, done.stderr


def test_estimating_loads_neither_torch_nor_transformers() -> None:
    done = run(
        "import sys, qlora_core\n"
        "from qlora_core import estimate\n"
        "assert callable(estimate) and callable(qlora_core.estimate)\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )

    assert done.returncode == 0, done.stderr


def test_the_lists_of_names_agree() -> None:
    assert sorted(qlora_core._HOME_OF) == sorted(qlora_core.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qlora_core.quantise  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
