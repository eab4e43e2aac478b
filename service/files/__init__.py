"""Uploaded and produced files: rows here, bytes in `service.storage`."""
