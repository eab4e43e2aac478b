"""The database's history, one dated and reversible step per file of `versions/`, applied by `operations.migrate`."""
