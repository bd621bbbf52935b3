"""What every part shares: errors, files written whole, records, provenance, the cache, processes, the console."""
