"""Where text comes from.

base.py               a corpus: named documents, in a fixed order
standard_library.py   the source that every machine has
finding.py files.py   which local files a path means; their texts
columns.py json_rows.py tables.py   the text column of jsonl, parquet and csv
hub.py                data sets of the Hugging Face hub
collection.py         corpora read together, under one policy for what is not UTF-8
"""
