"""A training's checkpoints, wherever it is killed between two writes; what it leaves to the next in its process."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from emloc_ray.errors import ArtifactError, StageError, TakenOver
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.stages.finetune import session as training_session
from emloc_ray.stages.finetune.session import NEWEST, GroupSession, LoneSession, claim_try_folder, own_environment


class Killed(Exception):
    pass


def checkpoint(folder: Path, step: int) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(str(step))
    (folder / "deep" / "weights").write_text("w" * step)
    return folder


def found(directory: Path) -> tuple[str, str] | None:
    with LoneSession(directory).checkpoint() as folder:
        if folder is None:
            return None
        return Path(folder, "trainer_state.json").read_text(), Path(folder, "deep", "weights").read_text()


def test_the_newest_is_found_and_the_others_go(tmp_path: Path) -> None:
    session = LoneSession(tmp_path / "kept")
    assert found(tmp_path / "kept") is None
    for step in (2, 4):
        session.save(checkpoint(tmp_path / f"made-{step}", step), step)
        assert found(tmp_path / "kept") == (str(step), "w" * step)
    session.save(None, 6)  # a rank that wrote nothing
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["checkpoint-4", "newest.json"]


def test_a_group_hears_that_a_node_of_it_is_about_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = [None, SimpleNamespace(deadline_ms=1)]
    rank = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(training_session.ray.train, "get_context", lambda: rank)
    monkeypatch.setattr(training_session.ray.train, "get_preemption_info", lambda: said.pop(0), raising=False)
    session = GroupSession(Path("kept"))
    assert (session.rank, session.world_size) == (1, 2)
    assert [session.is_leaving(), session.is_leaving()] == [False, True]
    monkeypatch.delattr(training_session.ray.train, "get_preemption_info")  # as before Ray 2.56
    assert not session.is_leaving()


def ranks(monkeypatch: pytest.MonkeyPatch, directory: Path, meet: Callable[[], object]) -> list[GroupSession]:
    """The two ranks of a group."""
    own = [SimpleNamespace(get_world_rank=lambda rank=rank: rank, get_world_size=lambda: 2) for rank in range(2)]
    monkeypatch.setattr(training_session.ray.train, "get_context", lambda: own.pop(0))
    monkeypatch.setattr(training_session.torch.distributed, "barrier", meet)
    monkeypatch.setattr(training_session, "broadcast_from_rank_zero", lambda name: name)
    return [GroupSession(directory) for _ in range(2)]


def test_a_group_names_a_checkpoint_once_all_ranks_have_put_theirs_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    LoneSession(kept).save(checkpoint(tmp_path / "first", 2), 2)
    meeting = threading.Barrier(2, lambda: named.append((kept / NEWEST).read_text()))
    named: list[str] = []
    first, second = ranks(monkeypatch, kept, lambda: meeting.wait(10))
    (tmp_path / "of second").mkdir()
    (tmp_path / "of second" / "random_state").write_text("1")
    with ThreadPoolExecutor(2) as pool:
        saved = pool.submit(second.save, tmp_path / "of second", 4)
        first.save(checkpoint(tmp_path / "of first", 4), 4)
        saved.result()
    assert "checkpoint-2" in named[0]
    assert found(kept) == ("4", "wwww")
    assert (kept / "checkpoint-4" / "random_state").read_text() == "1"
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-4", "newest.json"]


def test_a_group_that_lost_a_rank_names_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("connection closed by peer")

    kept = tmp_path / "kept"
    LoneSession(kept).save(checkpoint(tmp_path / "first", 2), 2)
    first, _ = ranks(monkeypatch, kept, lost)
    with pytest.raises(RuntimeError, match="peer"):
        first.save(checkpoint(tmp_path / "second", 4), 4)
    with first.checkpoint() as folder:
        assert folder == str(kept / "checkpoint-2")
    assert not (kept / "checkpoint-4").exists()  # a later save of that step is of one try alone


def test_a_group_whose_run_was_taken_keeps_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "mine")
    run.lock()
    first, second = ranks(monkeypatch, run.path("training", "kept"), lambda: None)
    first.save(checkpoint(tmp_path / "made", 2), 2)
    (tmp_path / "mine" / ".lock").write_text("process 2 on here\nanother\n")
    for session, folder in ((first, tmp_path / "made"), (second, None)):
        with pytest.raises(TakenOver):
            session.save(folder, 4)
    run.unlock()
    assert found(run.path("training", "kept")) == ("2", "ww")


def test_each_try_has_a_folder_of_its_own_with_what_was_trained_so_far(tmp_path: Path) -> None:
    """Paused inside a save, a process that held the run before writes late, where nobody looks."""
    run = RunDirectory(tmp_path / "mine")
    run.lock()
    training = run.path("training")
    training.mkdir()
    late = training / claim_try_folder(training) / "name"
    LoneSession(late).save(checkpoint(tmp_path / "first", 2), 2)
    own = training / claim_try_folder(training) / "name"
    assert found(own) == ("2", "ww")
    assert not late.exists()
    checkpoint(late / "checkpoint-9", 9)
    (late / "newest.json").write_text('{"folder": "checkpoint-9"}')
    assert found(own) == ("2", "ww")
    assert found(training / claim_try_folder(training) / "name") == ("2", "ww")
    (tmp_path / "mine" / ".lock").write_text("process 2 on here\nanother\n")
    before = sorted(training.iterdir())
    with pytest.raises(TakenOver):
        claim_try_folder(training)
    assert sorted(training.iterdir()) == before
    run.unlock()


@pytest.mark.parametrize("call", ["rename", "mkdir"])
def test_of_two_that_begin_at_once_one_has_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    if call == "rename":
        assert claim_try_folder(tmp_path) == "1"

    def slow(path: Path, *rest: Path) -> object:
        monkeypatch.undo()
        others.append(claim_try_folder(tmp_path))
        return getattr(path, call)(*rest)

    others: list[str] = []
    monkeypatch.setattr(Path, call, slow)
    own = claim_try_folder(tmp_path)
    assert int(own) == int(others[0]) + 1
    assert [place.name for place in tmp_path.iterdir()] == [own]


@pytest.mark.parametrize(("call", "kept"), [("atomic_file", 2), ("write_json", 2), ("discard", 4)])
def test_killed_before_any_write_one_whole_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, kept: int
) -> None:
    LoneSession(tmp_path / "kept").save(checkpoint(tmp_path / "first", 2), 2)
    second = checkpoint(tmp_path / "second", 4)

    def kill(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training_session, call, kill)
        with pytest.raises(Killed):
            LoneSession(tmp_path / "kept").save(second, 4)
    assert found(tmp_path / "kept") == (str(kept), "w" * kept)
    LoneSession(tmp_path / "kept").save(second, 4)
    assert found(tmp_path / "kept") == ("4", "wwww")
    assert not (tmp_path / "kept" / "checkpoint-2").exists()


def test_a_name_without_its_folder_begins_nothing_anew_in_silence(tmp_path: Path) -> None:
    (tmp_path / NEWEST).write_text('{"folder": "checkpoint-8"}')
    LoneSession(tmp_path).save(checkpoint(tmp_path / "made" / "x", 9), 9)
    (tmp_path / NEWEST).write_text('{"folder": "checkpoint-8"}')
    with pytest.raises(ArtifactError, match=r"newest.json names checkpoint-8, which is not there"):
        found(tmp_path)
    assert (tmp_path / "checkpoint-9").is_dir()


def test_all_ranks_go_on_from_what_the_first_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LoneSession(tmp_path / "kept").save(checkpoint(tmp_path / "made", 2), 2)
    _, second = ranks(monkeypatch, tmp_path / "kept", lambda: None)
    for said in (None, "checkpoint-2"):
        monkeypatch.setattr(training_session, "broadcast_from_rank_zero", lambda own, said=said: said)
        with second.checkpoint() as folder:
            assert folder == (said and str(tmp_path / "kept" / said))


def test_a_first_rank_that_stood_still_takes_nothing_from_the_group_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"

    def stand_still() -> None:
        """Meanwhile the group after it has come further."""
        LoneSession(kept).save(checkpoint(tmp_path / "later", 6), 6)

    late, _ = ranks(monkeypatch, kept, stand_still)
    with pytest.raises(StageError, match="Step 4 was saved too late: the training has gone on to checkpoint-6"):
        late.save(checkpoint(tmp_path / "made", 4), 4)
    assert found(kept) == ("6", "w" * 6)


def test_what_a_training_sets_in_the_environment_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.setenv("REMOVED", "before")
    monkeypatch.delenv("ADDED", raising=False)
    with contextlib.suppress(Killed), own_environment():
        os.environ.update(KEPT="other", ADDED="x")
        del os.environ["REMOVED"]
        raise Killed
    assert (os.environ["KEPT"], os.environ["REMOVED"]) == ("before", "before")
    assert "ADDED" not in os.environ
