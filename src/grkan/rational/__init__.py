"""The function F."""
