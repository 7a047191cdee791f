"""Where text comes from.

base.py               a corpus: named documents, in a fixed order
standard_library.py   the source that every machine has
files.py tables.py    local text files, and the text column of jsonl, parquet and csv
hub.py                data sets of the Hugging Face hub
collection.py         corpora read together, under one policy for what is not UTF-8
"""
