"""Many tasks over one cluster: each a chain of stages, each stage admitted by its own resources."""
