"""The whole method on one machine, verified: see `run`."""
