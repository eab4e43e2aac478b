"""`nibble dump` and `nibble restore`: database and blobs as they were at one moment, in a folder that needs nothing to be read.

`manifest.json` names the schema's migration, each table's rows and each blob with its SHA-256; `tables/` has the rows in PostgreSQL's
COPY text format, `blobs/` the blobs under their keys. `repository.py` has the SQL, `dump.py` and `restore.py` the order of things.
"""
