"""Weights in Hugging Face's format, read and written by a table that maps parameters to tensors."""
