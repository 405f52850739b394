"""Any prefix of a run's writes leaves a state from which the same run ends right: on a disk, and on an object store."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faulting.s3 import uri
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_values

from emloc_ray.config.reading import parse_config
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store.atomic import atomic_directory, write_json, write_text
from emloc_ray.io.store.node_cache import ensure, exists, sizes
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.planning.prepared import prepare
from emloc_ray.runs import steps as runs_steps
from emloc_ray.runs.reporter import Reporter
from emloc_ray.runs.steps import Steps
from emloc_ray.runs.turns import AtOnce
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.ray.tasks import Progress, Resources
from emloc_ray.stages.ray.usage import Usage
from emloc_ray.stages.stage import Stage

Run = Callable[[str, int], None]
Kill = tuple[int, int]  # before which write, with which seed
KILLS = st.tuples(st.integers(0, 60), st.sampled_from((1, 2)))
_places = itertools.count()


class Killed(BaseException):
    """What no code of ours catches, as a kill is not caught."""


@contextlib.contextmanager
def killed_at(write: int) -> Iterator[None]:
    """Ends the process, as far as it can tell, just before its ``write``-th change of what outlives it."""
    left = itertools.count(write, -1)

    def counting(function):  # type: ignore[no-untyped-def]
        def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
            if next(left) <= 0:
                raise Killed
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", counting(Path.replace))
        patch.setattr(shutil, "rmtree", counting(shutil.rmtree))
        for name in ("upload", "write", "delete"):
            patch.setattr(ObjectStore, name, counting(getattr(ObjectStore, name)))
        yield


def write_shards(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    """Three files, each of which is kept from a try that was killed."""
    folder = context.path("shards")
    discard_unless(folder, inputs)
    for number in range(3):
        if not exists(folder / f"{number}.bin"):
            write_text(folder / f"{number}.bin", f"{inputs['seed']}/{number}")
        progress(number + 1, 3)
    return {}


def write_whole(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    """One folder made of the shards."""
    ensure(context.path("shards"))
    content = b"+".join((context.path("shards", f"{number}.bin")).read_bytes() for number in range(3))
    with atomic_directory(context.path("whole")) as temporary:
        (temporary / "sum.bin").write_bytes(content)
        write_json(temporary / "about.json", inputs["shards"])
    return {}


# Of names that the pipeline has, for it orders stages by them.
SHARDS = Stage(
    name="calibrate",
    title="shards",
    workers=lambda config: config.merge,
    inputs=lambda context: {"seed": context.prepared.config.seed},
    run=write_shards,
    outputs=("shards",),
    resumes=True,
)
WHOLE = Stage(
    name="merge",
    title="whole",
    workers=lambda config: config.merge,
    inputs=lambda context: {"shards": context.made["calibrate"]},
    run=write_whole,
    outputs=("whole",),
)
STAGES = (SHARDS, WHOLE)


@pytest.fixture(scope="module")
def run(
    tiny_model_dir: Callable[..., Path], task_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """``run(place, seed)``: the pipeline's own steps over a stage of shards that is continued and one that is written whole."""
    base = prepare(parse_config(make_values(tmp_path_factory.mktemp("run") / "run", tiny_model_dir(), task_file)))

    def begin(place: str, seed: int) -> None:
        config = base.config.model_copy(update={"seed": seed})
        prepared = replace(base, config=config, run=RunDirectory(place))
        prepared.run.create({"seed": seed}, steps=[stage.name for stage in STAGES])
        steps, context = Steps(prepared, Reporter(), AtOnce()), Context(prepared, base.source.directory)
        for stage in STAGES:
            steps.run(stage, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_steps, "shortage", lambda *asked: None)  # there is no cluster to look at
        patch.setattr(runs_steps, "measured", lambda stage: contextlib.nullcontext(Usage(stage)))
        yield begin


def check(place: str, seed: int) -> None:
    directory = RunDirectory(place)
    assert directory.stages().keys() == {"calibrate", "merge"}
    for stage in STAGES:
        entry = directory.stages()[stage.name]
        assert directory.is_done(stage.name, entry["inputs"])
        assert directory.damaged(stage.name) == []
        assert not [file for file in sizes(directory.path(*stage.outputs)) if ".tmp" in file.name]
    assert directory.stages()["calibrate"]["inputs"] == fingerprint({"seed": seed})
    ensure(directory.path("whole"))
    assert directory.path("whole", "sum.bin").read_bytes() == f"{seed}/0+{seed}/1+{seed}/2".encode()


def break_off(run: Run, place: str, kills: list[Kill]) -> None:
    """Tries of two configs in turn, each killed; then one that is not."""
    for write, seed in kills:
        with contextlib.suppress(Killed), killed_at(write):
            run(place, seed)
    run(place, 1)
    check(place, 1)


@pytest.mark.slow
@settings(max_examples=15)
@given(kills=st.lists(KILLS, max_size=4))
def test_on_a_disk(run: Run, kills: list[Kill]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        break_off(run, f"{folder}/run", kills)


@settings(max_examples=8)
@given(kills=st.lists(KILLS, max_size=3))
def test_on_an_object_store(run: Run, s3_port: int, kills: list[Kill]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOC_RAY_CACHE", folder)
        place = uri(s3_port, f"prefix/{next(_places)}")
        break_off(run, place, kills)
        shutil.rmtree(folder)  # another node's
        Path(folder).mkdir()
        check(place, 1)


@pytest.mark.slow
def test_every_single_write_on_a_disk(run: Run, tmp_path: Path) -> None:
    """Of a first run, and of one with another config over a finished run."""
    run(f"{tmp_path}/finished/run", 1)
    for done in (False, True):
        for write in itertools.count():
            place = f"{tmp_path}/{done}-{write}/run"
            if done:
                shutil.copytree(f"{tmp_path}/finished/run", place)
            try:
                with killed_at(write):
                    run(place, 2)
            except Killed:
                run(place, 1)
                check(place, 1)
                continue
            assert write > 8
            break
