"""Checkpoints: files to sharded arrays and back, lazily and byte for byte."""
