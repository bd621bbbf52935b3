"""The page about runs, attacks and requests that is handed over."""
