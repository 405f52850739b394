"""The stages: each a plain function over artifact paths, and its Ray wrapper."""
