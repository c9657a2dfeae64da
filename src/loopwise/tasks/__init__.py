"""Data made in code, and text corpora."""
