"""The language model: a plain nn.Module, with no parallelism inside."""
