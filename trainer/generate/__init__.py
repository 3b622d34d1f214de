"""Text from a model: sampling, KV-cache decoding, and the terminal."""
