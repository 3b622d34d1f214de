"""Trivium: one distributed engine for pretraining, fine-tuning and practice with rewards."""

__version__ = "0.1.0"
