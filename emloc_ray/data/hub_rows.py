"""How many rows ``hf:NAME[@SUBSET][:SPLIT]`` has by its card on the hub, before any is fetched."""

from collections.abc import Mapping
from typing import Any

from emloc_ray.data.hub_splits import HubSplit
from emloc_ray.io.store.shared import Shared

_TIMEOUT_S = 10.0
_KNOWN = Shared[int | None](4096)  # hundreds of a batch's tasks ask; where no hub answers, the first alone waits for it


def num_rows(split: HubSplit) -> int | None:
    """The rows of a split as its data set's card counts them
    (https://huggingface.co/docs/hub/datasets-cards, ``dataset_info``); None where no card does, where it is a folder of this
    machine, or the hub does not answer."""
    return None if split.folder is not None else _KNOWN.get(split, lambda: _on_hub(split))


def _on_hub(split: HubSplit) -> int | None:
    from huggingface_hub import HfApi

    try:
        card = HfApi().dataset_info(split.dataset, timeout=_TIMEOUT_S).card_data
        says = {} if card is None else card.to_dict()
        return split.num_rows(_sizes(says.get("dataset_info") or [], split.subset))
    except Exception:  # noqa: BLE001  whatever it is: a plan does without, and the run says what is wrong
        return None


def _sizes(info: Mapping[str, Any] | list[Mapping[str, Any]], subset: str) -> dict[str, int]:
    """Rows by split of a subset; of the one called ``default`` where none is named and there are several."""
    subsets = info if isinstance(info, list) else [info]
    named = {each.get("config_name", ""): each.get("splits") or () for each in subsets}
    splits = next(iter(named.values())) if len(named) == 1 and not subset else named.get(subset or "default", ())
    return {split["name"]: split["num_examples"] for split in splits}
