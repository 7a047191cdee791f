"""A server of one model: rows of any requests continue together, over OpenAI's HTTP interface.

jobs.py        a prompt to continue, and what has come of it
batch.py       the rows that run: join, draw, extend, leave
prefixes.py    prompts and answers whose states are kept
scheduler.py   the one thread that owns the model: jobs in, tokens out
parameters.py  what OpenAI's requests may hold; wire.py    requests as jobs; answers.py    their answers
chat.py        messages as a prompt
app.py         HTTP; server.py    a socket, and an end in good order
"""
