"""How many tokens a calibration reads."""

from collections import Counter
from collections.abc import Mapping

from emloc_ray.data.ahead import batches_by_length
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.modeling.architecture import load_config
from emloc_ray.modeling.experts import owner_of
from emloc_ray.modeling.inputs import model_call
from emloc_ray.stages.calibrate.job import CalibrationJob


def tokens_read(job: CalibrationJob, counts: Mapping[str, int]) -> int:
    """Tokens of the rows that were read, by the linears' ``counts``. Patches of an image, which its tower reads, are none, and
    experts' linears read a share: where there are no others, the rows' tokens are counted."""
    others = {name for name, stream in job.streams if stream == "other"}
    every = [count for name, count in counts.items() if name not in others and owner_of(name) is None]
    return max(every or _counted(job).values())


def _counted(job: CalibrationJob) -> Counter[str]:
    """The tokens of the job's shards that count, by stream."""
    config = load_config(job.model_dir, trust_remote_code=dict(job.model_options).get("trust_remote_code", False))
    shards, counts = TokenShards(job.tokens_dir), Counter[str]()
    for number in range(*job.shards):
        for _, batch in batches_by_length(shards.shard(number), job.batch_size, job.pad_token_id):
            counted = model_call(config, batch, tokens=job.tokens).counted
            counts.update({stream: int(mask.sum()) for stream, mask in counted.items()})
    return counts
