"""`alter report`: one HTML page about runs, their attacks and requests, to hand over; one module a section."""
