"""Resume points: what is in one and in its files, and how a run goes on from there; `resuming.resume` is where to begin."""
