"""From the user's files to token shards: reading, formats, tokenizing, splits; Ray Data runs it."""
