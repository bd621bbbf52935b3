"""What every package shares: errors, atomic files, records, provenance, the cache, processes, the console."""
