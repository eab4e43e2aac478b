"""A job's story: events and metrics, numbered by `seq` without gaps or late arrivals."""
