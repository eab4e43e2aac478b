"""The HTTP edge: routes, the envelope of errors, headers, pages. Rules and SQL are in `service`."""
