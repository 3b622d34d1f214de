"""Sample number -> tokens on this rank: shards, the order as a pure function, and this rank's batches."""
