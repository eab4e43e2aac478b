"""`python -m qlora_core COMMAND`."""

from qlora_core.commands import main

main()
