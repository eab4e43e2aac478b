"""One file per resource, each with a `router`; `api.main` mounts them."""
