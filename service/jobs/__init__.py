"""Fine-tuning jobs: creating, reading, what is wished of them, and the state machine (`state.move` alone writes a status)."""
