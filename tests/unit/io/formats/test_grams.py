"""Grams on disk: a slot commits sums and position together, slots add up in order, the store finds a linear's Gram."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faulting.s3 import uri
from slot_files import read_slot

from emloc_ray.core.gram import Gram
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import open_shard
from emloc_ray.io.formats.grams import (
    INDEX,
    GramStore,
    last_shard,
    reduce_slots,
    write_gram_index,
    write_gram_shard,
    write_slot,
)
from emloc_ray.io.store.node_cache import discard, mirror
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.objects import Objects


def gram(seed: int, in_features: int = 6, tokens: int = 10) -> tuple[Gram, torch.Tensor]:
    """A Gram and the activations it sums."""
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed))
    made = Gram.zero(in_features)
    made.update(x)
    return made, x


def test_slot_round_trip(tmp_path: Path) -> None:
    (first, _), (second, _) = gram(0), gram(1, in_features=300, tokens=4)
    path = tmp_path / "slot.safetensors"
    write_slot(path, {"a": first, "b": second}, last_shard=7)
    grams, last_shard = read_slot(path)
    assert last_shard == 7
    assert set(grams) == {"a", "b"}
    assert torch.equal(grams["a"].matrix, first.matrix)
    assert torch.equal(grams["b"].symmetric(), second.symmetric())
    assert (grams["a"].num_tokens, grams["b"].num_tokens) == (10, 4)
    only, last_shard = read_slot(path, ["b"])
    assert list(only) == ["b"]
    assert last_shard == 7


def test_a_slot_read_back_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, _ = gram(0)
    more = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    write_slot(tmp_path / "slot", {"a": whole}, 0)
    back = read_slot(tmp_path / "slot")[0]["a"]
    whole.update(more)
    back.update(more)
    assert torch.equal(back.matrix, whole.matrix)
    assert back.num_tokens == whole.num_tokens == 15


def test_slots_add_up_in_slot_order(tmp_path: Path) -> None:
    # In float32, (big + 1) - big is 0 and (big - big) + 1 is 1: the order shows.
    big = torch.full((3, 3), 2.0**30)
    parts = [big, torch.ones(3, 3), -big]
    paths = []
    for number, matrix in enumerate(parts):
        paths.append(tmp_path / f"slot-{number}")
        write_slot(paths[-1], {"a": Gram(matrix, 2), "b": Gram(matrix.clone(), 3)}, number)
    assert not reduce_slots(paths, ["a"])["a"].matrix.any()
    other = reduce_slots([paths[0], paths[2], paths[1]], ["b", "a"])
    assert list(other) == ["b", "a"]
    assert torch.equal(other["a"].symmetric(), torch.ones(3, 3))
    assert (other["a"].num_tokens, other["b"].num_tokens) == (6, 9)


def test_a_slot_that_holds_other_shards_than_it_should_is_not_summed(tmp_path: Path) -> None:
    paths = [tmp_path / f"slot-{number}" for number in range(2)]
    for number, path in enumerate(paths):
        write_slot(path, {"a": gram(0)[0]}, number)
    assert reduce_slots(paths, ["a"], [0, 1])["a"].num_tokens == 20
    with pytest.raises(ArtifactError, match="slot-1 holds the sums to 1, not to 3: run the same command again"):
        reduce_slots(paths, ["a"], [0, 3])


@pytest.mark.parametrize("in_features", [1, 6, 300])
def test_reduced_slots_equal_one_pass_over_all_tokens(tmp_path: Path, in_features: int) -> None:
    made = [gram(seed, in_features, tokens=4 + seed) for seed in range(3)]
    paths = [tmp_path / f"slot-{number}" for number in range(3)]
    for path, (part, _) in zip(paths, made, strict=True):
        write_slot(path, {"a": part}, 0)
    total = reduce_slots(paths, ["a"])["a"]
    x = torch.cat([x for _, x in made]).double()
    torch.testing.assert_close(total.symmetric().double(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert total.num_tokens == len(x)


def test_a_node_without_the_slots_reads_of_each_what_it_sums(
    s3_port: int, node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = mirror(uri(s3_port, "grams/slots"))
    slots = [root / "slots" / f"slot-{number}.safetensors" for number in range(2)]
    for number, path in enumerate(slots):
        write_slot(path, {name: gram(seed + number)[0] for seed, name in enumerate("abc")}, number)
    read: list[int] = []
    read_range = Objects.read_range

    def counted(self: Objects, path: str, offset: int, count: int) -> bytes:
        read.append(count)
        return read_range(self, path, offset, count)

    monkeypatch.setattr(Objects, "read_range", counted)
    monkeypatch.setattr(ObjectStore, "download", lambda *_: pytest.fail("fetched a whole slot"))
    elsewhere = [tmp_path / "other" / root.name / path.relative_to(root) for path in slots]
    [total] = reduce_slots(elsewhere, ["b"]).values()
    assert torch.equal(total.matrix, (gram(1)[0].matrix + gram(2)[0].matrix).tril())
    assert total.num_tokens == 20
    length, header, matrix = read[:3]
    assert (length, matrix) == (8, 6 * 6 * 4)
    assert read == [length, header, matrix] * 2


def test_a_slot_that_goes_while_it_is_read_is_told(s3_port: int, node_cache: Path, tmp_path: Path) -> None:
    path = mirror(uri(s3_port, "grams/gone")) / "slot" / "slot.safetensors"
    write_slot(path, {"a": gram(0)[0]}, 0)
    with open_shard(tmp_path / "other" / path.parts[-3] / "slot" / path.name) as shard:
        discard(path)
        with pytest.raises(ArtifactError, match="removed or written anew while it was read"):
            shard.entries[0].read_rows()


def test_store_round_trip_and_groups(tmp_path: Path) -> None:
    (first, x), (second, y) = gram(0), gram(1, in_features=300, tokens=4)
    write_gram_shard(tmp_path / "one.safetensors", {"l.q": first})
    write_gram_shard(tmp_path / "two.safetensors", {"l.down": second})
    weight_map = {"l.q": "one.safetensors", "l.down": "two.safetensors"}
    write_gram_index(tmp_path, [["l.q", "l.k", "l.v"], ["l.down"]], weight_map, {"l.q": 10, "l.down": 4})
    store = GramStore(tmp_path)
    for name in ("l.q", "l.k", "l.v"):
        assert name in store
        assert store.num_tokens(name) == 10
        torch.testing.assert_close(store.read(name), x.T @ x)
    torch.testing.assert_close(store.read("l.down"), y.T @ y)
    assert store.read("l.down").dtype == torch.float32
    assert torch.equal(store.read("l.down"), store.read("l.down").T)
    assert store.num_tokens("l.down") == 4
    assert "lm_head" not in store
    packed = (tmp_path / "two.safetensors").stat().st_size
    assert packed < 0.52 * 300 * 300 * 4  # a triangle


def test_no_index_does_not_count(tmp_path: Path) -> None:
    write_gram_shard(tmp_path / "one.safetensors", {"l.q": gram(0)[0]})
    with pytest.raises(ArtifactError, match=INDEX) as caught:
        GramStore(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_gram_index(tmp_path, [["l.q"]], {"l.q": "one.safetensors"}, {"l.q": 1})
    with pytest.raises(ArtifactError, match=r"one\.safetensors"):
        GramStore(tmp_path).read("l.q")


def test_a_slot_says_which_shard_it_holds_last(tmp_path: Path) -> None:
    write_slot(tmp_path / "slot", {"a": gram(0)[0]}, 7)
    assert last_shard(tmp_path / "slot") == 7


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    write_gram_index(tmp_path, [["l.q"]], {"l.q": "../one.safetensors"}, {"l.q": 10})
    with pytest.raises(ArtifactError, match=rf"{INDEX} names '\.\./one\.safetensors' .* leads out of its folder"):
        GramStore(tmp_path)
