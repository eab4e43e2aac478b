"""Memory: where a step's went, and what a run does where it ends; `recovery.until_it_fits` is where to begin."""
