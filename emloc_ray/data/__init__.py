"""The way from the user's files to token shards: reading, formats, tokenizing, splits; run by Ray."""
