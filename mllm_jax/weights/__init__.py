"""Weights in Hugging Face's format, read and written through one table of names."""
