"""``python -m grating_core`` is the ``grating`` command."""

from grating_core.cli.main import main

if __name__ == "__main__":
    main()
