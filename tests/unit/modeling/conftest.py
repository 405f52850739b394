"""What tests of several adapter methods share: adapters on disk, trained once."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_cases import trained


@pytest.fixture(scope="session")
def adapter_dir(
    emulator_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """``adapter_dir(case, family)``: an adapter trained on that family's emulator; do not write to it."""

    def make(case: str, family: str) -> Path:
        directory = tmp_path_factory.mktemp("adapter") / "a"
        trained(directory, emulator_dir(family), case, family)
        return directory

    return functools.cache(make)
