"""PostgreSQL and Valkey of our own, on Unix sockets under the data folder, for machines that have neither."""
