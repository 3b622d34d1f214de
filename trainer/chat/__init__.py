"""Text to ids and back: the only place in Trivium where it happens."""
