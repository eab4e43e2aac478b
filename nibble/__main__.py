"""`python -m nibble`."""

from nibble.main import main

main()
