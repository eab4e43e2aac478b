"""What the service knows and does: rules, tables, queue, storage. SQL lives in `repository.py` files only."""
