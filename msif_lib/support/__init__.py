"""Below the method: reading data, calling modules as functions, checks, results on disk."""
