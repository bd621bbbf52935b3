"""`alter report`: a page about runs, attacks and requests, to hand over."""
