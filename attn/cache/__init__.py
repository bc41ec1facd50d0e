"""Caches of keys and values: how entries are stored, and attention over what is stored."""
