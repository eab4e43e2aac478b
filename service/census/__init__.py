"""How the service stands, counted over all projects: for `nibble doctor` and for metrics, never for a user of the API."""
