"""Token shards of every split."""
