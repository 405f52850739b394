"""What a shared cache's keys say beside a stage's inputs."""

from __future__ import annotations

import pytest

from emloc_ray.runs import steps


@pytest.mark.parametrize("package", ["emloc-ray", "torch", "transformers", "peft", "tokenizers"])
def test_another_version_of_a_library_is_another_key(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    inputs, installed = {"seed": 0}, {"torch": "2.6.0+cpu"}
    monkeypatch.setattr(steps, "version", lambda name: installed.get(name, "1.2.3"))

    def key() -> str:
        steps.made_by.cache_clear()
        return steps.cache_key("factorize", inputs)

    before = key()
    installed[package] = "1.2.9" if package != "torch" else "2.6.1+cu130"
    assert key() == before
    installed[package] = "9.9.0"
    assert key() != before
    steps.made_by.cache_clear()
