"""`python -m rar_jax` is `rar-jax`."""

import sys

from rar_jax.cli import main

sys.exit(main())
