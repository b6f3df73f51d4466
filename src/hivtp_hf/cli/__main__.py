"""`python -m hivtp_hf.cli`, as `hivtp`."""

from . import main

main()
