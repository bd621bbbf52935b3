"""`alter certificate`: a signed statement of what was forgotten, how, and what was measured; checked offline.

It names no subject and holds no row and no reply: data are named by their hashes. A certificate is of a request or of a
finished run, and signed with a key of who issues it (`alter.requests.signing`). Who checks it needs the file, the public key
and, to see that it is about the model at hand, that model; no network, no database.

`form`: what every certificate holds, and the hashes of files · `issue`: what is stated of a request or a run · `check`:
parsing and comparing · `display`: the tables · `command`: the settings and the command.
"""
