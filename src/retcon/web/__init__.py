"""The page: one model, its store, and what is done to them, for browsers on this machine."""
