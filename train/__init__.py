"""Config, data, sharding, loop, checkpoint and metrics; `python -m train.main` is the entry point."""
