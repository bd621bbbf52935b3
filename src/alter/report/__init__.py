"""`alter report`: one HTML page about runs, their attacks and requests, to hand over.

`runs` reads what the page is about, `page` puts it together; a module for each section: `summary`, `verdict`,
`tables`, `samples`, `tokens`, `training`, `attacks`, `requests`, `origin`. No other package imports from here.
"""
