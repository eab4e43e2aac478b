"""Fine-tuning jobs: creating, reading, and the state machine (`state.move` alone writes a status)."""
