"""Files by content: checkpoints, Grams, shards."""
