"""Where files are: on a disk, in an object store, in a node's copies."""
